"""The one meaning of a pattern: an ordinary regular expression over whole segments of module names, or a selector.

A pattern takes a module where it covers the end of the module's dotted name from the start of some segment on; whatever
lies inside the module comes along. So `layer.1` takes `encoder.layer.1` with its `attention`, never `layer.11`; a
leading `^` ties a pattern to the start of the name. A selector (`@blocks[-4:]`) stands alone and survives a change of
model. Patterns are data from strangers: matching has a deadline, and nothing here knows weights or imports torch.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import combinations
from math import prod

import regex

from engine.outline import Outline, below

LONGEST = 512
"""Most characters of a pattern."""
PATIENCE = 2.0
"""Seconds that matching one pattern against a whole model may take."""
MOST_REPEATS = 1000
"""Largest product of the counts in a pattern's braces: the regex engine unrolls them, one inside the other."""
SELECTORS = ("@head", "@embeddings", "@blocks", "@norms", "@biases")

RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("attention.attention", "attention"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("vision_tower.vision_model", "vision_tower"),
    ("language_model.model", "language_model"),
    ("encoder.layers", "layers"),
    ("encoder.layer", "layers"),
    ("model.layers", "language_model.layers"),
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
)
"""Pieces of names in transformers 4 and what 5 calls them in some models; whether in this one, its own names tell."""

_SELECTOR = regex.compile(r"(@\w+)(?:\[(.*)\])?")
_INDEX = regex.compile(r"\s*-?\d{1,6}\s*")
_SLICE = regex.compile(r"\s*(-?\d{1,6})?\s*:\s*(-?\d{1,6})?\s*(?::\s*(-?[1-9]\d{0,5})?\s*)?")
_NUMBER_SET = regex.compile(r"\[(\d+)-(\d+)\]")
_COUNT = regex.compile(r"\{(\d*),?(\d*)\}")
_BEYOND = regex.compile(r"\(\?(?:R|&|P>|\(|[+-]?\d)|(?<!\\[pP])\{(?=[^\d,}])|\\L<")
_COUNTED_DOT = regex.compile(r"\\?\.\{(?=[\d,])(\d*),?(\d*)\}")


@dataclass(frozen=True)
class Selection:
    """What a pattern takes of a model."""

    modules: tuple[str, ...]
    """The modules it names, in definition order; their children come along without being listed."""
    parameters: frozenset[str]
    """Every parameter it reaches, the model's own (a tied one by each name that is reached) and adapters'."""


def lint(pattern: str) -> str | None:
    """Why this can't be a pattern, whatever the model; None where nothing speaks against it."""
    if not pattern.strip():
        return "is empty; a pattern names modules"
    if len(pattern) > LONGEST:
        return f"is {len(pattern)} characters long; a pattern has at most {LONGEST}"
    if pattern.startswith("@"):
        return _lint_selector(pattern)
    return _lint_numbers(pattern) or _lint_size(pattern) or _lint_syntax(pattern) or _lint_edges(pattern)


def select(pattern: str, outline: Outline) -> Selection:
    """What a pattern takes of a model; an empty selection where a regular expression names nothing.

    Raises `ValueError`, in the user's words, for what can't be a pattern, for blocks that the model doesn't have, and
    for an expression that takes too long to match.
    """
    if wrong := lint(pattern):
        raise ValueError(f"`{pattern}` {wrong}")
    if pattern == "@biases":
        return Selection((), frozenset(name for name, _ in _parameters(outline) if name.split(".")[-1] == "bias"))
    named = _selected(pattern, outline) if pattern.startswith("@") else _matched(pattern, outline.names)
    taken = set(named)
    modules = tuple(name for name in outline.names if name in taken)
    parameters = (name for name, module in _parameters(outline) if _inside(module, taken))
    return Selection(modules, frozenset(parameters))


def nearest(pattern: str, outline: Outline, count: int = 3) -> tuple[str, ...]:
    """Up to `count` patterns near this one that do name modules: ends of names, the best first."""
    ends = list(dict.fromkeys(end for name in outline.names for end in _ends(name)))
    found: dict[str, None] = {}
    for words in _plain(pattern):
        found.update(dict.fromkeys(get_close_matches(words, ends, n=count, cutoff=0.6)))
    return tuple(found)[:count]


def moved(pattern: str, outline: Outline) -> str | None:
    """Why a pattern that names no module looks as though it should, or None.

    It may carry a name that transformers 5 changed, which holds if the new name exists in this model, or it may name a
    parameter.
    """
    if pattern.startswith("@"):
        return None
    for changes, renamed in _renamed(pattern):
        if _matched(renamed, outline.names):
            called = " and ".join(f"`{old}` is `{new}`" for old, new in changes)
            what = f"`{pattern}` names no module of this model, where {called} (transformers 5 renamed many)"
            return f"{what}; write `{renamed}`"
    if owner := _parameter_owner(pattern, outline):
        return f"`{pattern}` names a parameter; patterns name modules, such as `{owner}`"
    return None


def _lint_selector(pattern: str) -> str | None:
    found = _SELECTOR.fullmatch(pattern)
    name = "@" + regex.split(r"\W", pattern[1:], maxsplit=1)[0]
    if name not in SELECTORS:
        near = get_close_matches(name, SELECTORS, n=1)
        return f"is no selector; {f'did you mean `{near[0]}`?' if near else 'there are ' + ', '.join(SELECTORS)}"
    if not found:
        return f"is a selector with something behind it; `{name}` stands alone, as another pattern of the list"
    if found[2] is None:
        return None
    if name != "@blocks":
        return f"takes no index; only `@blocks` does, and `{name}` stands alone"
    if _INDEX.fullmatch(found[2]) or _SLICE.fullmatch(found[2]):
        return None
    return "has no index that Python would take; write `@blocks[0]`, `@blocks[-4:]` or `@blocks[2:6]`"


def _lint_size(pattern: str) -> str | None:
    """Looked at before the expression is compiled, for compiling a few characters can take all the memory there is."""
    counts = [max(int(number[:9] or 1) for number in counted) for counted in _COUNT.findall(pattern)]
    if prod(max(count, 1) for count in counts) > MOST_REPEATS:
        return f"repeats too often: the counts in its braces multiply to at most {MOST_REPEATS:,}"
    if found := _BEYOND.search(pattern):
        return f"holds `{found[0]}`: calls and fuzzy matching have no place in a pattern"
    return None


def _lint_syntax(pattern: str) -> str | None:
    if not pattern.isprintable():
        return "holds a character that can't be printed, and no module name has one"
    try:
        _compiled(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        what, position = getattr(error, "msg", "it is too large"), getattr(error, "pos", None)
        at = "" if position is None else f" at position {position + 1}"
        starred = "; `.*` stands for anything" if pattern.startswith("*") else ""
        return f"is no regular expression: {what}{at}{starred}"
    return None


def _lint_numbers(pattern: str) -> str | None:
    for found in _NUMBER_SET.finditer(pattern):
        if len(found[1]) > 1 or len(found[2]) > 1:
            return (
                f"holds `{found[0]}`, a set of single characters and not the numbers {found[1]} to {found[2]}; "
                f"write {_numbers(int(found[1]), int(found[2]))}"
            )
    if found := _COUNTED_DOT.search(pattern):
        low, high = found[1] or "0", found[2] or found[1]
        return (
            f"holds `{found[0]}`, which repeats the dot and counts no layers; write `.` and then "
            f"{_numbers(int(low[:9]), int((high or low)[:9]))}"
        )
    return None


def _numbers(low: int, high: int) -> str:
    """How to write the numbers from `low` to `high`."""
    if low >= high:
        return "`@blocks[...]` or the numbers themselves with `|` between"
    some = [*range(low, high + 1)] if high - low < 3 else [low, low + 1, "...", high]
    return f"`({'|'.join(map(str, some))})`, or `@blocks[{low}:{high + 1}]`"


def _lint_edges(pattern: str) -> str | None:
    if regex.match(r"\\?\.(?![*+?{])", pattern):
        return "starts with a dot; a pattern starts at the start of a segment by itself, so leave the dot out"
    if pattern.endswith("."):
        return "ends with a dot; children come along by themselves, so leave the dot out"
    return None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    with warnings.catch_warnings():
        # `regex` warns of what may come to mean something else one day; a recipe's author can't act on it.
        warnings.simplefilter("ignore")
        return regex.compile(pattern)


def _matched(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a regular expression takes, within `PATIENCE` seconds for all of them together."""
    expression, deadline = _compiled(pattern), time.monotonic() + PATIENCE
    return tuple(name for name in names if _takes(expression, name, pattern, deadline))


def _takes(expression: regex.Pattern[str], name: str, pattern: str, deadline: float) -> bool:
    start = 0
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if expression.fullmatch(name, pos=start, timeout=left):
                return True
            start = name.find(".", start) + 1
            if not start:
                return False
    except (TimeoutError, MemoryError, RecursionError):
        raise ValueError(f"`{pattern}` takes too long to match; say it without repeats inside repeats") from None


def _selected(pattern: str, outline: Outline) -> tuple[str, ...]:
    found = _SELECTOR.fullmatch(pattern)
    assert found is not None, "lint has seen it"
    if found[1] == "@norms":
        return tuple(module.name for module in outline.modules if "Norm" in module.kind)
    if found[1] == "@head":
        return outline.head
    if found[1] == "@embeddings":
        return outline.embeddings
    return _blocks(pattern, found[2], outline.blocks)


def _blocks(pattern: str, index: str | None, blocks: tuple[str, ...]) -> tuple[str, ...]:
    if not blocks:
        raise ValueError(f"`{pattern}` names nothing: this model has no stack of repeated blocks")
    if index is None:
        return blocks
    if cut := _SLICE.fullmatch(index):
        chosen = blocks[slice(*(int(number) if number else None for number in cut.groups()))]
    else:
        position = int(index)
        chosen = (blocks[position],) if -len(blocks) <= position < len(blocks) else ()
    if not chosen:
        raise ValueError(f"`{pattern}` names nothing: this model has {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    return chosen


def _parameters(outline: Outline) -> list[tuple[str, str]]:
    """Each name of each parameter, with the module that this name lies in."""
    named = [(parameter.name, parameter.module) for parameter in outline.parameters]
    aliases = [alias for parameter in outline.parameters for alias in parameter.aliases]
    return named + [(alias, alias.rpartition(".")[0]) for alias in aliases]


def _inside(module: str, taken: set[str]) -> bool:
    """Whether a module is one of those taken or lies inside one."""
    while module:
        if module in taken:
            return True
        module = module.rpartition(".")[0]
    return False


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _plain(pattern: str) -> list[str]:
    """A regular expression as the names it seems to mean: one for each alternative, the last of each group."""
    text = regex.sub(r"\((?:\?:)?(?:[^()|]*\|)*([^()|]*)\)", r"\1", pattern[:LONGEST])
    text = regex.sub(r"\\d[+*]?|\[[^]]*\][+*]?", "0", text).replace(r"\.", ".")
    return [regex.sub(r"[\\^$*+?(){}\[\]]", "", part).strip(".") for part in text.split("|")]


def _renamed(pattern: str) -> list[tuple[tuple[tuple[str, str], ...], str]]:
    """The pattern under the known renames, fewest changes first, each with the changes it took."""
    found = [(old, new) for old, new in RENAMES if old in pattern.replace(r"\.", ".")][:6]
    renamed = []
    for changes in (chosen for size in range(1, len(found) + 1) for chosen in combinations(found, size)):
        text = pattern.replace(r"\.", ".")
        for old, new in changes:
            text = regex.sub(rf"(?<![\w]){regex.escape(old)}(?!\w)", new, text)
        if text != pattern and lint(text) is None:
            renamed.append((changes, text))
    return renamed


def _parameter_owner(pattern: str, outline: Outline) -> str | None:
    own = tuple(parameter.name for parameter in outline.parameters if parameter.adapter is None)
    taken = _matched(pattern, own)
    return next((p.module for p in outline.parameters if p.name in taken and below(p.name, p.module)), None)
