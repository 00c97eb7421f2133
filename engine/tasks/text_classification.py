"""Text classification: one label, several labels or a number, for one text or a pair.

Texts are cut at the model's limit and padded batch by batch, never to one length for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine import metrics
from engine.errors import PlanError, Problem
from engine.tasks import labels
from engine.tasks.base import TRUNCATED, Example, Facts, Table, Task
from engine.tasks.columns import not_text, stop_at

_UNLIMITED = 10**9
"""A tokenizer without a limit says 1e30."""


class TextClassification(Task):
    """One label, several labels or a number for a text or a pair of texts."""

    auto = "AutoModelForSequenceClassification"
    columns = {
        "text": ("text", "sentence1", "premise", "question1", "question", "sentence", "content", "review", "tweet"),
        "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "sentence", "passage"),
        "label": ("label", "labels", "class", "target", "category", "intent", "score"),
    }
    optional = frozenset({"text_pair"})
    target = "label"

    type: Literal["text-classification"]
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """Hugging Face's word for what the label column holds; found from the column itself if left out."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which a text is cut; the model's own limit if left out."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        texts = [name for name in ("text", "text_pair") if name in tables["train"].columns]
        stop_at(not_text(table, name) for table in tables.values() for name in texts)
        return labels.learn(tables, self.problem_type)

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        limit = self._limit(processor)
        pair = [list(rows["text_pair"])] if "text_pair" in rows else []
        encoded = processor(list(rows["text"]), *pair, truncation=limit is not None, max_length=limit)
        lost = [bool(encoding.overflowing) for encoding in encoded.encodings or ()]
        return {**encoded, "labels": labels.encode(rows["label"], facts), **({TRUNCATED: lost} if lost else {})}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch
        from transformers import DataCollatorWithPadding

        if processor.pad_token is None:
            what = "its tokenizer has no padding token, so texts of different lengths can't share a batch"
            raise PlanError([Problem(("model", "path"), what)])
        # Tensor cores want multiples of 8; a limit that is none could be overrun, and the position with it.
        eights = torch.accelerator.is_available() and (self._limit(processor) or 8) % 8 == 0
        return DataCollatorWithPadding(processor, pad_to_multiple_of=8 if eights else None)

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        return metrics.compute(names, facts.problem, predictions, references)

    def _limit(self, processor: Any) -> int | None:
        """Tokens after which a text is cut, or None where neither recipe nor model sets a limit."""
        own = processor.model_max_length if processor.model_max_length < _UNLIMITED else None
        if self.max_length and own and self.max_length > own:
            what = f"the model reads {own:,} tokens at most, not {self.max_length:,}"
            raise PlanError([Problem(("task", "max_length"), what, f"write {own} or leave the key out")])
        return self.max_length or own
