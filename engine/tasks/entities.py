"""Entities in tagged words, and how well they were found: exact match of kind and span, as conlleval counts.

Reads IOB1, IOB2, IOBES and BILOU tags, and takes what breaks their rules as leniently as the CoNLL-2000 script does: an
entity begins wherever the kind changes. Counts and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

OUTSIDE = "O"
ALONE = frozenset("SU")
"""Prefixes of an entity of one word."""
ENDS = frozenset("ELSU")
"""Prefixes after which no entity goes on."""
PREFIXES = frozenset("BIELSU")

Entity = tuple[str, int, int]
"""Kind, first word, and the word after the last."""


def in_chunks(tags: Sequence[str]) -> bool:
    """Whether tags mark entities: all of them but O have a prefix such as B-, and there is one at least."""
    marked = [tag for tag in tags if tag != OUTSIDE]
    return bool(marked) and all(tag[:1] in PREFIXES and tag[1:2] == "-" for tag in marked)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities that the tags of one text mark, in order."""
    start, kind, before = -1, "", OUTSIDE
    for place, tag in enumerate((*tags, OUTSIDE)):
        prefix, _, name = tag.partition("-")
        begins = prefix != OUTSIDE and (start < 0 or prefix == "B" or prefix in ALONE or before in ENDS or name != kind)
        if start >= 0 and (begins or prefix == OUTSIDE):
            yield kind, start, place
            start = -1
        if begins:
            start, kind = place, name
        before = prefix


def scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, all kinds counted together, and the accuracy of single words.

    What has nothing to divide by is 0, as it is in seqeval (Nakayama 2018), which counts the same.
    """
    taken = [set(entities(row)) for row in predictions]
    real = [set(entities(row)) for row in references]
    hits = sum(len(one & other) for one, other in zip(taken, real, strict=True))
    named, there = sum(map(len, taken)), sum(map(len, real))
    words = list(zip(chain(*predictions), chain(*references), strict=True))
    return {
        "f1": _share(2 * hits, named + there),
        "precision": _share(hits, named),
        "recall": _share(hits, there),
        "accuracy": _share(sum(one == other for one, other in words), len(words)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
