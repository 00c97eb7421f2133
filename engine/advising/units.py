"""What advice chooses among: the units of a model, and the candidates that train one or several of them.

A unit is a part of the model that is trained or left alone as a whole: the embeddings, a block (or a few neighbours,
where there are many), the head, whatever is left. Names and sizes only; no weights, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from engine.outline import Outline, Parameter, below

MOST = 8
"""Units that blocks are put into at most: of more, each holds some neighbours."""
HEAD = "head"
"""Name of the unit and of the candidate that everything is measured against: nothing but the head trains."""
EVERYTHING = "everything"


@dataclass(frozen=True)
class Unit:
    """One part of the model."""

    name: str
    """How a user is told of it: `embeddings`, `block 3`, `blocks 4-7`, `head`, `rest`."""
    pattern: str
    """The selector that takes it in a recipe; empty for the rest, which only `everything` trains."""
    parameters: tuple[str, ...]
    size: int
    """Number of elements."""
    last: str
    """Its last module in forward order: what the unit hands on is what this module does."""


@dataclass(frozen=True)
class Candidate:
    """What could be unfrozen; the head trains along with every one of them."""

    name: str
    opens: tuple[str, ...]
    """The patterns that a recipe unfreezes, the head's left out; none where nothing is frozen at all."""
    units: tuple[str, ...]
    """The units that train, the head's left out."""
    top: bool = False
    """Whether they are the uppermost blocks without a gap: what a schedule from the top down can open."""

    @property
    def slug(self) -> str:
        """The candidate as the name of a stage."""
        return self.name.replace(" + ", "-and-").replace(" ", "-")


def units(outline: Outline, most: int = MOST) -> tuple[Unit, ...]:
    """The units of a model in forward order; tied weights are one tensor, and belong to the first unit with it."""
    spans = _spans(len(outline.blocks), most)
    roots = [("embeddings", "@embeddings", outline.embeddings)] if outline.embeddings else []
    roots += [(_title(span), _selector(span), outline.blocks[span.start : span.stop]) for span in spans]
    roots += [(HEAD, "@head", outline.head)] if outline.head else []
    found, taken = [], set[str]()
    for name, pattern, modules in roots:
        held = [p for p in outline.parameters if p.name not in taken and any(_inside(p, modules))]
        taken |= {p.name for p in held}
        if held:
            found.append(_unit(name, pattern, held, modules[-1]))
    rest = [p for p in outline.parameters if p.name not in taken]
    return (*found, _unit("rest", "", rest, rest[-1].module)) if rest else tuple(found)


def candidates(found: Sequence[Unit], blocks: int) -> tuple[Candidate, ...]:
    """All that short runs are tried on: the head alone, each unit, the top of the blocks, everything.

    `blocks` is the number of the model's blocks. None is left out for a score's sake: no score is good enough for that.
    """
    singles = [Candidate(u.name, (u.pattern,), (u.name,)) for u in found if u.pattern and u.name != HEAD]
    stack = [u for u in found if u.name.startswith("block")]
    tops = [_top(stack[-count:], count, len(stack), blocks) for count in _depths(len(stack))]
    if singles and stack and singles[-1].units == (stack[-1].name,):
        singles[-1] = Candidate(singles[-1].name, singles[-1].opens, singles[-1].units, top=True)
    whole = Candidate(EVERYTHING, (), tuple(u.name for u in found if u.name != HEAD))
    return (Candidate(HEAD, (), ()), *singles, *tops, whole)


def window(found: Sequence[Unit], names: Sequence[str]) -> Candidate:
    """Several units at once, such as the neighbours that a score proposes."""
    chosen = [unit for unit in found if unit.name in names]
    return Candidate(" + ".join(u.name for u in chosen), tuple(u.pattern for u in chosen), tuple(names))


def anchor(tried: Sequence[Candidate], share: float = 0.25) -> Candidate | None:
    """The rule of thumb that advice has to beat: the uppermost `share` of the blocks (Lee et al. 2019, Elsa)."""
    tops = sorted((each for each in tried if each.top), key=lambda each: len(each.units))
    total = max((len(each.units) for each in tops), default=0)
    return next((each for each in tops if len(each.units) >= share * total), None)


def _spans(blocks: int, most: int) -> list[range]:
    """Blocks 0 to `blocks` in at most `most` runs of as equal a length as can be."""
    count = min(blocks, most)
    edges = [round(blocks * place / count) for place in range(count + 1)] if count else [0]
    return [range(start, end) for start, end in pairwise(edges)]


def _title(span: range) -> str:
    return f"block {span.start}" if len(span) == 1 else f"blocks {span.start}-{span.stop - 1}"


def _selector(span: range) -> str:
    return f"@blocks[{span.start}]" if len(span) == 1 else f"@blocks[{span.start}:{span.stop}]"


def _depths(count: int) -> list[int]:
    """How many of the uppermost units to try at once: two, a quarter, half, two thirds and all of them."""
    wanted = {2, ceil(count / 4), ceil(count / 2), ceil(2 * count / 3), count}
    return sorted(depth for depth in wanted if 1 < depth <= count)


def _top(stack: Sequence[Unit], count: int, total: int, blocks: int) -> Candidate:
    """The uppermost units; all of them are `all blocks`."""
    start = blocks if not stack else _start(stack[0].pattern)
    names = tuple(unit.name for unit in stack)
    if count == total:
        return Candidate("all blocks", ("@blocks",), names, top=True)
    return Candidate(f"top {blocks - start}", (f"@blocks[-{blocks - start}:]",), names, top=True)


def _start(selector: str) -> int:
    return int(selector.removeprefix("@blocks[").rstrip("]").split(":")[0])


def _inside(parameter: Parameter, modules: Iterable[str]) -> Iterable[bool]:
    owners = (parameter.module, *(alias.rpartition(".")[0] for alias in parameter.aliases))
    return (below(owner, module) for owner in owners for module in modules)


def _unit(name: str, pattern: str, held: Sequence[Parameter], last: str) -> Unit:
    return Unit(name, pattern, tuple(p.name for p in held), sum(p.size for p in held), last)
