"""Summarization: a short text for a long one, judged by ROUGE (Lin 2004) between 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine.tasks.base import Facts, Table
from engine.tasks.columns import not_text, stop_at
from engine.tasks.written import Written


class Summarization(Written):
    """A summary of a text."""

    columns = {
        "text": ("text", "document", "article", "dialogue", "content", "body"),
        "summary": ("summary", "highlights", "abstract", "target", "headline", "title"),
    }
    target = "summary"
    own_metrics = ("rougeL", "rouge1", "rouge2", "rougeLsum")
    library = ("rouge-score", "rouge_score")

    type: Literal["summarization"]

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        self.need_library()
        stop_at(not_text(table, name) for table in tables.values() for name in self.columns)
        return Facts()

    def pairs(self, rows: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str]]:
        return list(rows["text"]), list(rows["summary"])

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        """Mean F-measures over the examples, words stemmed; sentences are told apart by line and by `.`, `!`, `?`."""
        if not names:
            return {}
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(names), use_stemmer=True)
        found = [
            scorer.score(_sentences(reference), _sentences(prediction))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {name: sum(each[name].fmeasure for each in found) / len(found) for name in names}


def _sentences(text: str) -> str:
    """One sentence a line, as ROUGE-Lsum wants them; the other kinds don't look at lines."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)
