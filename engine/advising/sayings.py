"""The five answers in words, each with its numbers: for the terminal, the page and the comments of the recipe alike.

It says what was measured and how sure that is, and where nothing was measured it says so. It decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.advising.advice import Advice
from engine.advising.answers import NORMAL, Interval, Ranked, Verdict
from engine.advising.units import EVERYTHING, HEAD
from engine.reporting.picture import duration

WEAK = 0.3
"""Rank correlation with the runs below which a score is called uninformative (rule D4)."""


@dataclass(frozen=True)
class Answer:
    """One of the five."""

    question: str
    short: str
    """The answer in a few words."""
    long: str
    """The numbers behind it."""


def answers(advice: Advice) -> tuple[Answer, ...]:
    """The five answers; fewer while there is nothing to answer with."""
    found = advice.verdict
    if found is None:
        return ()
    return (
        Answer("Do I need to unfreeze?", *_need(advice, found)),
        Answer("Which layers?", *_which(advice, found)),
        Answer("When?", *_when(advice, found)),
        Answer("What if more, what if less?", *_more_or_less(advice, found)),
        Answer("What would change this?", *_change(advice, found)),
    )


def value(found: Interval | None) -> str:
    """A metric with the half-width of its 95 % interval: `86.0 ± 1.6`."""
    return "-" if found is None else f"{100 * found.mean:.1f} ± {100 * NORMAL * found.error:.1f}"


def points(found: Interval | None) -> str:
    """A difference in points with its 95 % interval: `+5.9 [+2.1, +9.8]`."""
    return "-" if found is None else f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def row(found: Verdict, name: str) -> Ranked | None:
    """The line of a candidate in the table."""
    return next((each for each in found.table if each.candidate.name == name), None)


def opened(name: str) -> str:
    """A candidate as something that is unfrozen."""
    return "nothing but the head" if name == HEAD else name


def _need(advice: Advice, found: Verdict) -> tuple[str, str]:
    gain, metric = found.gain, advice.metric
    if found.need == "not measurable" or gain is None:
        prior = "kept frozen, which is a rule of thumb here and no measurement"
        if advice.measurable:
            return "not measured", f"There was no time for runs; {prior}."
        few = f"{advice.rows:,} rows, or too few of most classes, leave every difference in the noise"
        return "not measurable with this data", f"{few}; {prior}."
    frozen = row(found, HEAD)
    thawed = max(
        (each for each in found.table if each.value and each.candidate.name != HEAD), key=lambda each: each.value.mean
    )
    numbers = (
        f"{metric} {value(frozen.value if frozen else None)} frozen, {value(thawed.value)} with "
        f"{thawed.candidate.name}: {points(gain)} points, paired, on {gain.rows:,} rows ({found.decided_by}); "
        f"worth it from {100 * advice.min_gain:g}."
    )
    if found.need == "undecided":
        more = f" About {found.rows_needed:,} rows to judge by would settle it." if found.rows_needed else ""
        return "undecided", numbers + more
    return ("yes" if found.need == "yes" else "no, keep it frozen"), numbers


def _which(advice: Advice, found: Verdict) -> tuple[str, str]:
    if found.need == "not measurable":
        return opened(found.chosen), "The head alone is the smallest thing that can learn the task."
    mine = row(found, found.chosen)
    near = [each.candidate.name for each in found.table if each.near and each.candidate.name != found.chosen]
    said = [f"Measured in {found.decided_by}: {advice.metric} {value(mine.value if mine else None)}."]
    if found.best != found.chosen:
        best = row(found, found.best)
        said.append(
            f"{found.best} comes out highest ({value(best.value if best else None)}), by less than a standard error, "
            "and costs more: the smallest that is as good is chosen."
        )
    if near:
        said.append(f"Within one standard error of the best as well: {', '.join(near)}.")
    ranked = [name for name in advice.ranking() if name != "embeddings"][:3]
    if len(ranked) > 1:
        said.append(f"Of single units, short runs gain most by {', then '.join(ranked)}.")
    if suspects := advice.suspects():
        said.append(
            f"More can be read off the last layer without {suspects[0]} than with it, by "
            f"{advice.scores['bypass'][suspects[0]]:.0f} standard errors: it is damaged, or has learnt something else."
        )
    return opened(found.chosen), " ".join(said)


def _when(advice: Advice, found: Verdict) -> tuple[str, str]:
    if found.chosen == HEAD:
        return "never", "Nothing but the head trains, on activations that are computed once."
    head = advice.short.get(HEAD)
    cost = f" It takes {duration(head[0].seconds)} on kept activations." if head else ""
    if advice.when is None:
        return (
            "head first, then all of it",
            f"A random head would send noise into the blocks.{cost} That was not measured here.",
        )
    better = f"Fitting the head first is worth {points(advice.when)} points for {found.chosen}.{cost}"
    if advice.when.low <= 0 <= advice.when.high:
        return "head first, though it hardly matters", better
    return (
        ("head first, then all of it", better)
        if advice.when.mean > 0
        else (
            "at once",
            f"{better} Training all of it from the first step came out better here.",
        )
    )


def _more_or_less(advice: Advice, found: Verdict) -> tuple[str, str]:
    mine = row(found, found.chosen)
    if mine is None or mine.value is None:
        return "not measured", "There was no time for runs."
    more = [each for each in found.table if each.against and each.work > mine.work]
    less = [each for each in found.table if each.against and each.work < mine.work]
    widest = next(
        (each for each in more if each.candidate.name == EVERYTHING), max(more, key=lambda e: e.work, default=None)
    )
    next_less = max(less, key=lambda each: each.work, default=None)
    said = []
    if widest:
        said.append(f"More: {widest.candidate.name} {points(widest.against)} points, {_slower(widest, mine)}.")
    if next_less:
        said.append(
            f"Less: {opened(next_less.candidate.name)} {points(next_less.against)} points, {_slower(next_less, mine)}."
        )
    gains = [f"more {_verb(widest)}" for _ in [0] if widest] + [f"less {_verb(next_less)}" for _ in [0] if next_less]
    return ", ".join(gains) or "nothing to compare with", " ".join(said)


def _verb(other: Ranked) -> str:
    against = other.against
    assert against is not None
    if against.low > 0:
        return "gains"
    return "loses" if against.high < 0 else "makes no measurable difference"


def _slower(other: Ranked, mine: Ranked) -> str:
    if not other.seconds or not mine.seconds:
        return "not timed"
    ratio = other.seconds / mine.seconds
    return f"{ratio:.1f}x the time a step" if ratio >= 1 else f"{1 / ratio:.1f}x faster a step"


def _change(advice: Advice, found: Verdict) -> tuple[str, str]:
    said, short = [], "more of the same would not"
    sizes = sorted(advice.growth)
    if len(sizes) > 1:
        gain = advice.growth[sizes[-1]] - advice.growth[sizes[-2]]
        error = max((each.error for each in advice.probes.values()), default=0.0)
        said.append(
            f"A probe of the best layer gains {100 * gain:+.1f} points from {sizes[-2]:,} to {sizes[-1]:,} rows."
        )
        if gain > error:
            short = "more rows"
            said.append("More rows are likely worth more than more layers.")
    if advice.lost_above:
        best, last = advice.probes[advice.lost_above], advice.probes[str(advice.last_layer)]
        said.append(
            f"{advice.lost_above} reads {best.accuracy:.1%} where the last layer reads {last.accuracy:.1%}: a model "
            "that is cut there could do with less. It does not say which block to train."
        )
    agreed = {name: found for name, found in advice.agreement.items() if found is not None}
    gain_rho = agreed.get("cross_half_gain")
    if gain_rho is not None:
        weak = (
            "cheap scores are not informative on this model" if gain_rho < WEAK else "cheap scores agree with runs here"
        )
        said.append(f"Rank correlation of the cross-half gain with short runs {gain_rho:+.2f}: {weak}.")
    if advice.available > advice.rows:
        said.append(f"{advice.rows:,} of {advice.available:,} rows were looked at.")
    if advice.dropped:
        said.append(f"A larger budget: {'; '.join(advice.dropped)}.")
        short = "a larger budget" if short.startswith("more of") else f"{short}, a larger budget"
    if found.need == "undecided" and "rows" not in short:
        short = f"{short}, rows to judge by"
    return short, " ".join(said) or "Nothing that was measured."
