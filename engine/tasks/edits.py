"""How far a sequence is from the one it should be: the fewest insertions, deletions and substitutions between them.

Levenshtein 1966. A rate of errors is edits over the length of what should be there, summed over all sequences before
it is divided, as the packages jiwer and evaluate do; a dozen lines spare one of them and its compiled dependency.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edits(given: Sequence[Hashable], true: Sequence[Hashable]) -> int:
    """The fewest edits that turn `given` into `true`."""
    import numpy as np

    codes = {item: code for code, item in enumerate(dict.fromkeys((*given, *true)))}
    wanted = np.array([codes[item] for item in true], dtype=np.int64)
    places = np.arange(len(wanted) + 1)
    row = places.copy()
    for item in given:
        kept = row[:-1] + (wanted != codes[item])
        row = row + 1
        row[1:] = np.minimum(row[1:], kept)
        # what is left are insertions: each place costs one more than the best place before it
        row = np.minimum.accumulate(row - places) + places
    return int(row[-1])


def error_rate(given: Sequence[Sequence[Hashable]], true: Sequence[Sequence[Hashable]]) -> float:
    """Edits over the length of what is true; NaN where nothing is."""
    total = sum(map(len, true))
    return sum(map(edits, given, true)) / total if total else float("nan")
