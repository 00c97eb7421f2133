"""KappaTune: which units hold the matrices with the lowest condition numbers, as PEFT finds them."""

from __future__ import annotations

from typing import Literal

from engine.outline import below
from engine.signals.base import Evidence, Signal


class Kappa(Signal):
    """Mean rank of the unit's linear layers in PEFT's own order of targets (`find_kappa_target_modules`), 1 the first.

    KappaTune (https://github.com/oswaldoludwig/kappaTune) adapts what is well conditioned, so that what stretches its
    inputs one way stays as it is. It is about forgetting less, and looks at weights alone.
    """

    title = "KappaTune (PEFT)"
    paper = "Ludwig, KappaTune"
    limits = "never sees the data; chooses what may be moved safely, not what is worth moving"
    needs = "weights"

    type: Literal["kappa"] = "kappa"

    def measure(self, seen: Evidence) -> dict[str, float]:
        try:
            from peft import find_kappa_target_modules
        except ImportError:  # an older PEFT
            return {}
        order = find_kappa_target_modules(seen.model, top_p=1.0, show_progress=False)["target_modules"] or []
        scores = {}
        for unit in seen.units:
            owners = {name.rpartition(".")[0] for name in unit.parameters}
            ranks = [1 - place / len(order) for place, name in enumerate(order) if any(below(o, name) for o in owners)]
            if ranks:
                scores[unit.name] = sum(ranks) / len(ranks)
        return scores
