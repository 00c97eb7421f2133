"""The lines of a self-test -> its table: hits on planted damage, regret and cost on real rows, intervals kept.

It reads lines and measures nothing. What came out badly is told like what came out well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, erf, sqrt
from typing import Any

import numpy as np

from engine.advising import regret
from engine.advising.planting import INPUT

Line = Mapping[str, Any]

STRONG = 1.5
"""Noise, in a matrix's own deviations, from which damage is called strong."""
MIN_GAIN = 0.005
WHO = ("advice", "one-seed sweep", "always head", "top quarter", "everything", "any")
"""Those who pick a candidate; `any` is what a random one is worth."""
ORDERS = ("bypass", "cross_half_gain", "gsnr", "auto_rgn", "fim", "spectrum", "kappa")


def report(lines: Sequence[Line]) -> Iterator[str]:
    """The table, as lines of Markdown."""
    kinds: dict[str, list[Line]] = defaultdict(list)
    failed = [line for line in lines if "error" in line]
    for line in lines:
        if "error" not in line:
            kinds[line["kind"]].append(line)
    plants = kinds["plant"]
    for title, found in (
        ("strong damage", [each for each in plants if each["strength"] >= STRONG]),
        ("weak damage", [each for each in plants if each["strength"] < STRONG]),
    ):
        if found:
            yield from _planted(title, found)
    if kinds["shift"]:
        yield from _shifted(kinds["shift"])
    if kinds["truth"]:
        yield from _real(kinds["truth"], kinds["advice"])
    for line in failed:
        yield f"failed: {line['case']}: {line['error']}"


def _planted(title: str, found: Sequence[Line]) -> Iterator[str]:
    yield f"### Planted: one block noised, {title}, {len(found)} cases"
    yield ""
    yield "| ranked by | right unit first | among the first two |"
    yield "|---|---|---|"
    right = [line["right"] for line in found]
    for name, orders in _orders(found):
        yield f"| {name} | {regret.hits(orders, right, 1):.0%} | {regret.hits(orders, right, 2):.0%} |"
    yield f"| largest drop of a probe | {np.mean([line['drop'] in line['right'] for line in found]):.0%} | |"
    yield ""
    yield "| block | cases | first | first two | ranked first instead |"
    yield "|---|---|---|---|---|"
    for block in sorted({line["right"][0] for line in found}):
        mine = [line for line in found if line["right"][0] == block]
        orders = [line["units"] for line in mine]
        good = [line["right"] for line in mine]
        wrong = sorted({line["units"][0] for line in mine if line["units"][:1] != [block]} - {block})
        yield (
            f"| {block} | {len(mine)} | {regret.hits(orders, good, 1):.0%} | {regret.hits(orders, good, 2):.0%} | "
            f"{', '.join(wrong)} |"
        )
    yield ""
    yield f"{_seconds(found)}"
    yield ""


def _orders(found: Sequence[Line]) -> Iterator[tuple[str, list[list[str]]]]:
    """Each way to rank, with its order of units in every case; the head is no unit that could have been damaged."""
    yield "**short runs, out of fold**", [line["units"] for line in found]
    for name in ORDERS:
        orders = [[unit for unit in line["scores"].get(name, []) if unit != "head"] for line in found]
        if any(orders):
            yield name.replace("_", " "), orders


def _shifted(found: Sequence[Line]) -> Iterator[str]:
    yield f"### Shifted digits, {len(found)} cases"
    yield ""
    yield "Right: the embeddings or the first block where inputs changed; the head or the last block where labels did."
    yield ""
    yield "| shift | cases | frozen | first | first two | ranked first |"
    yield "|---|---|---|---|---|---|"
    for shift in sorted({line["shift"] for line in found}, key=lambda each: (each not in INPUT, each)):
        mine = [line for line in found if line["shift"] == shift]
        orders = [line["ranking"] if shift in INPUT else _with_head(line) for line in mine]
        right = [line["right"] for line in mine]
        frozen = float(np.mean([line["head_accuracy"] for line in mine]))
        first = ", ".join(order[0] for order in orders)
        yield (
            f"| {shift} | {len(mine)} | {frozen:.1%} | {regret.hits(orders, right, 1):.0%} | "
            f"{regret.hits(orders, right, 2):.0%} | {first} |"
        )
    yield ""
    yield _seconds(found)
    yield ""


def _with_head(line: Line) -> list[str]:
    """The order of units, the head first where advice says that nothing else need train."""
    units = list(line["units"])
    return ["head", *units] if line["chosen"] == "head" else units


def _real(truths: Sequence[Line], advices: Sequence[Line]) -> Iterator[str]:
    names = sorted({line["set"] for line in truths})
    known = {name: _truth([line for line in truths if line["set"] == name]) for name in names}
    yield "### Real rows: regret in points of test accuracy, cross-fitted"
    yield ""
    yield f"| set | frozen | best | {' | '.join(WHO)} | cost |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    totals: dict[str, list[float]] = defaultdict(list)
    for name in names:
        truth, swept = known[name], [line for line in truths if line["set"] == name]
        told = [line for line in advices if line["set"] == name and line["chosen"] in truth]
        best = max(truth, key=lambda each: regret.accuracy(truth, each))
        picks = (
            [line["chosen"] for line in told],
            [_swept(line) for line in swept],
            ["head"],
            [_quarter(truth)],
            ["everything"],
            list(truth),
        )
        found = {who: regret.regret(truth, each) if each else None for who, each in zip(WHO, picks, strict=True)}
        for who, each in found.items():
            if each:
                totals[who].append(each.mean)
        cost = np.mean([line["spent"] for line in told]) / np.mean([line["swept"] for line in swept]) if told else None
        yield (
            f"| {name} | {regret.accuracy(truth, 'head'):.1%} | {best} {regret.accuracy(truth, best):.1%} | "
            + " | ".join(_points(each) for each in found.values())
            + f" | {'-' if cost is None else f'{cost:.0%}'} |"
        )
    means = (f"{100 * np.mean(totals[who]):+.1f}" if totals[who] else "-" for who in WHO)
    yield "| mean | | | " + " | ".join(means) + " | |"
    yield ""
    yield from _intervals(advices, known)


def _intervals(advices: Sequence[Line], known: Mapping[str, regret.Truth]) -> Iterator[str]:
    """Whether the answer to "do I need to unfreeze" was right, and whether intervals hold what they promise."""
    right, held, told = [], [], []
    for line in advices:
        truth = known.get(line["set"])
        if truth is None or line["gain"] is None or line["thawed"] not in truth:
            continue
        mean, low, high, error = line["gain"]
        real, doubt = regret.gain(truth, line["thawed"], "head")
        held.append(low - doubt <= real <= high + doubt)
        told.append((_share((mean - MIN_GAIN) / max(error, 1e-9)), real > MIN_GAIN))
        if line["need"] in ("yes", "no") and abs(real - MIN_GAIN) > 2 * doubt:
            right.append((line["need"] == "yes") == (real > MIN_GAIN))
    if held:
        yield (
            f"Do I need to unfreeze: right in {sum(right)} of {len(right)} decided cases whose truth is clear; Brier "
            f"score {regret.brier(told):.3f}; {np.mean(held):.0%} of {len(held)} intervals (95 %) hold the truth, "
            "within its own error."
        )
        yield ""


def _truth(lines: Sequence[Line]) -> regret.Truth:
    """Candidate -> right or wrong for each seed and test row."""
    shared = set.intersection(*(set(line["candidates"]) for line in lines))
    return {
        name: np.array([[float(bit) for bit in line["candidates"][name]["test"]] for line in lines])
        for name in lines[0]["candidates"]
        if name in shared
    }


def _swept(line: Line) -> str:
    """What a user picks who has tried everything once and has validation rows."""
    found = line["candidates"]
    return max(found, key=lambda name: (found[name]["validation"], -found[name]["loss"]))


def _quarter(truth: regret.Truth) -> str:
    blocks = sum(name.startswith("block ") and "+" not in name for name in truth)
    count = ceil(blocks / 4)
    return f"top {count}" if count > 1 else f"block {blocks - 1}"


def _points(found: regret.Regret | None) -> str:
    return "-" if found is None else f"{100 * found.mean:+.1f} ± {100 * found.error:.1f}"


def _share(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2


def _seconds(found: Sequence[Line]) -> str:
    cpu, folds = np.mean([line["cpu"] for line in found]), np.mean([line["folds"] for line in found])
    return f"{cpu:.0f} CPU-seconds a case on average, short runs on {folds:.1f} folds."
