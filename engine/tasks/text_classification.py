"""Text classification: one label, several labels or a number, for one text or a pair."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.tasks.base import Task


class TextClassification(Task):
    """One label, several labels or a number for a text or a pair of texts."""

    type: Literal["text-classification"]
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """Hugging Face's word for what the label column holds; found from the column itself if left out."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which a text is cut; the model's own limit if left out."""
