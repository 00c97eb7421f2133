"""Text classification: one label, several labels or a number, for one text or a pair.

Texts are cut at the model's limit and padded batch by batch, never to one length for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine import metrics
from engine.tasks import labels, texts
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import not_text, stop_at


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
        given = [name for name in ("text", "text_pair") if name in tables["train"].columns]
        stop_at(not_text(table, name) for table in tables.values() for name in given)
        return labels.learn(tables, self.problem_type)

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        limit = texts.limit(self.max_length, processor)
        pair = [list(rows["text_pair"])] if "text_pair" in rows else []
        encoded = processor(list(rows["text"]), *pair, truncation=limit is not None, max_length=limit)
        return {**encoded, **texts.truncated(encoded), "labels": labels.encode(rows["label"], facts)}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        return texts.padder(processor, texts.limit(self.max_length, processor))

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        return metrics.compute(names, facts.problem, predictions, references)
