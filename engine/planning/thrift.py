"""Notes on recipes that pay without gain: what keeps the frost line low, and what is computed for nothing.

They are notes and never errors: a recipe may know better. Pure, like the plan that they are about.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.outline import Outline, below
from engine.plan import Plan, Stage
from engine.planning.forecast import WORTH, Costs
from engine.planning.openings import Opening
from engine.recipe import Recipe

SMALL = 0.02
"""Share of what trains that is little enough to be asked whether it is worth its way down."""
LITTLE = 0.05
"""Share of a stage's memory that is not worth computing anything again."""
DEARER = 0.15
"""Share of a step's work that is worth a note."""


def notes(recipe: Recipe, plan: Plan, outline: Outline) -> tuple[str, ...]:
    """A sentence for each stage and reason."""
    asked = (_deep, _prompted, _unkept, _recomputed)
    found = [note for stage in plan.stages for ask in asked for note in ask(recipe, stage, plan, outline)]
    return tuple(dict.fromkeys(found))


def _deep(_recipe: Recipe, stage: Stage, _plan: Plan, outline: Outline) -> Iterator[str]:
    """Something small that trains far below all else, so that every step goes down to it."""
    whole = Costs(outline, frozenset(stage.trainable))
    price = whole.forward(replayed=True) + whole.backward()
    layers = [layer for layer in _layers(outline) if any(below(owner, layer) for owner in whole.owners)]
    lower: set[str] = set()
    for layer in layers[:-1]:
        lower |= {p.name for p in whole.trained if below(p.module, layer)}
        size = sum(p.size for p in whole.trained if p.name in lower)
        if size > SMALL * stage.size:
            return
        rest = Costs(outline, frozenset(stage.trainable) - lower)
        saved = 1 - (rest.forward(replayed=True) + rest.backward()) / (price or 1.0)
        if saved >= DEARER:
            names = ", ".join(f"`{pattern}`" for pattern in _causes(stage, lower, whole))
            share = f"{size / stage.size:.1%} of what trains"
            yield (
                f"stage `{stage.name}`: {names} opens {size:,} elements in `{layer}`, {share}; "
                f"without them the frost line lies higher and a step costs {saved:.0%} less"
            )
            return


def _prompted(_recipe: Recipe, stage: Stage, _plan: Plan, _outline: Outline) -> Iterator[str]:
    """Virtual tokens, below which nothing is ever kept."""
    for opening in stage.opens:
        if opening.what == "virtual tokens":
            what = f"the virtual tokens of `{opening.pattern}` change every layer"
            yield f"stage `{stage.name}`: {what}, so nothing lies below the frost line and nothing is replayed"


def _layers(outline: Outline) -> list[str]:
    """Embeddings, blocks and head in forward order."""
    order = {module.name: rank if module.order is None else module.order for rank, module in enumerate(outline.modules)}
    return sorted({*outline.embeddings, *outline.blocks, *outline.head}, key=lambda name: order[name])


def _causes(stage: Stage, lower: set[str], costs: Costs) -> list[str]:
    """The patterns of the stage that opened them; what never was frozen has none."""
    owners = {p.module for p in costs.trained if p.name in lower}
    opened = [opening.pattern for opening in stage.opens if _opens(opening, owners)]
    return opened or ["what nothing freezes"]


def _opens(opening: Opening, owners: set[str]) -> bool:
    if opening.pattern in ("@biases", "@norms") and not opening.modules:
        return True
    return any(below(owner, name) for owner in owners for name in opening.modules)


def _unkept(recipe: Recipe, stage: Stage, plan: Plan, _outline: Outline) -> Iterator[str]:
    """A frozen prefix that is computed anew in every epoch because the recipe says so."""
    epochs = stage.steps / max(1, stage.steps_per_epoch)
    saved = 1 - stage.cached_cost / stage.cost if stage.cost else 0.0
    off = recipe.cache.mode == "off" and not recipe.task.draws and plan.measured
    if off and epochs > 1 and stage.below >= WORTH and saved >= DEARER:
        yield (
            f"stage `{stage.name}`: `cache: off` computes the frozen {stage.below:.0%} of the forward pass "
            f"{epochs:g} times over; kept, a step would cost {saved:.0%} less"
        )
    size = sum(kept.forecast.cache_bytes for kept in plan.stages)
    if stage.forecast.cache_bytes > recipe.cache.budget * 1e9:
        yield (
            f"stage `{stage.name}`: what lies below the frost line takes {stage.forecast.cache_bytes / 1e9:.1f} GB, "
            f"more than `cache.budget` ({recipe.cache.budget:g} GB), so nothing of it is kept"
        )
    elif size > recipe.cache.budget * 1e9 and stage is plan.stages[-1]:
        yield f"all stages together keep {size / 1e9:.1f} GB, more than `cache.budget`: earlier ones make room"


def _recomputed(recipe: Recipe, stage: Stage, plan: Plan, outline: Outline) -> Iterator[str]:
    """Activations that are computed again although keeping them would take little."""
    if not recipe.training.activation_checkpointing or not plan.measured:
        return
    costs, longest = Costs(outline, frozenset(stage.trainable)), plan.sizes.longest
    plain, again = costs.kept(longest), costs.kept(longest, recomputed=True)
    micro = min(recipe.per_device_batch_size or recipe.batch_size, recipe.batch_size)
    saved = micro * max(0.0, plain - again) / (stage.forecast.memory.total + micro * (plain - again))
    work = costs.recomputed(plan.sizes) / ((costs.forward(plan.sizes) + costs.backward(plan.sizes)) or 1.0)
    if saved < LITTLE:
        what = f"computes {work:.0%} more a step and spares {saved:.1%} of the memory" if work else "finds no block"
        yield f"stage `{stage.name}`: `activation_checkpointing` {what}; leave the key out where no stage needs it"
