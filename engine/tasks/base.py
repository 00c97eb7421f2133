"""What every task is: its keys in a recipe, and the few verbs that turn rows into losses and metrics.

A task is a part of the recipe and nothing else holds its state; whatever it learns about the data is a `Facts` value.
Torch, transformers and scikit-learn are imported inside the verbs, so that reading a recipe stays cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from engine.part import Part

if TYPE_CHECKING:
    import numpy as np

Row = Mapping[str, Any]
"""One example as the data set gives it, by the task's own column names."""
Example = dict[str, Any]
"""One example as the model takes it; `length` is its number of tokens, where it has one."""


@dataclass(frozen=True)
class Facts:
    """What the data say of the task: known before the model is built, saved with it."""

    labels: tuple[str, ...] = ()
    """Label names, in the order of their ids; empty where there are none (regression, language models)."""
    problem: str = ""
    """Hugging Face's `problem_type`, where the task has one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model's config that follow from the data."""


class Task(Part, ABC):
    """One thing people fine-tune for, named by the Hub's pipeline tag."""

    auto: ClassVar[str]
    """Name of the transformers auto class, e.g. `AutoModelForSequenceClassification`."""
    processor: ClassVar[str] = "AutoTokenizer"
    """Name of the transformers class that prepares inputs."""
    columns: ClassVar[Mapping[str, tuple[str, ...]]]
    """The task's own column names, each with the names it is looked for under; the first that exists is taken."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Columns that need not exist."""
    metrics: ClassVar[tuple[str, ...]]
    """Metrics that are computed where the recipe names none; the first decides what is best."""

    @abstractmethod
    def facts(self, columns: Mapping[str, Sequence[Any]], features: Mapping[str, Any]) -> Facts:
        """What the training rows say: label names, kind of problem.

        `columns` holds the whole training split by the task's column names, `features` the data set's own feature
        types. Raises `PlanError` where the rows contradict themselves.
        """

    @abstractmethod
    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        """A batch of rows (columns of equal length) as the model's inputs, labels included, unpadded."""

    @abstractmethod
    def collate(self, processor: Any) -> Callable[[Sequence[Example]], dict[str, Any]]:
        """The function that pads examples into one batch of tensors, batch first."""

    def weight(self, batch: Mapping[str, Any]) -> int:
        """How many units the batch's mean loss is a mean over: examples here, live tokens in a language task."""
        return len(batch["labels"])

    @abstractmethod
    def score(self, predictions: Any, references: Any, names: Sequence[str], facts: Facts) -> dict[str, float]:
        """The named metrics of predictions against references, both ordered by example."""

    def predict(self, outputs: Any) -> Any:
        """A model's outputs -> one prediction per example, as a tensor or a list."""
        return outputs.logits


Scores = Mapping[str, "Callable[[np.ndarray, np.ndarray], float]"]
