"""What every task is: its keys in a recipe, and the few verbs that turn rows into losses and metrics.

A task is a part of the recipe and nothing else holds its state; whatever it learns about the data is a `Facts` value.
Torch, transformers, pyarrow and scikit-learn are imported inside the verbs, so that reading a recipe stays cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from engine import metrics
from engine.part import Part

if TYPE_CHECKING:
    import pyarrow

Example = dict[str, Any]
"""One example as the model takes it, unpadded, labels included."""

TRUNCATED = "truncated"
"""The one column of encoded rows that is no input: whether a row lost its end. It is counted and dropped."""


@dataclass(frozen=True)
class Table:
    """One split as the data set gives it, whole, by the task's own column names."""

    name: str
    """How a user is told of it: the name of its file, or of its split."""
    columns: Mapping[str, pyarrow.ChunkedArray]
    """The columns as Arrow arrays, which may lie on disk."""
    features: Mapping[str, Any]
    """The columns' `datasets` feature types."""
    spans: tuple[range, ...]
    """The rows of the file or split that the rows here are, in order, counted from 0."""

    def row(self, index: int) -> str:
        """How a user finds a row: `train.csv, row 17`. Rows count from 1 as lines do; a header is not a row."""
        for span in self.spans:
            if index < len(span):
                return f"{self.name}, row {span[index] + 1:,}"
            index -= len(span)
        raise IndexError(f"{self.name} has no such row")


@dataclass(frozen=True)
class Facts:
    """What the data say of the task: known before the model is built, saved with it."""

    labels: tuple[str, ...] = ()
    """Label names, in the order of their ids; empty where there are none (regression, language models)."""
    problem: str = ""
    """Hugging Face's `problem_type`, where the task has one."""
    form: str = ""
    """How the label column is written: `names`, `ids`, `vectors` of 0 and 1, or `numbers`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the model's config that follow from the data."""
    notes: tuple[str, ...] = ()
    """Sentences worth printing: what was found out rather than told."""


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
    new_head: ClassVar[bool] = True
    """Whether what lies on top of the pretrained model is the task's own, and not a pretrained part like an LM head."""
    target: ClassVar[str | None] = None
    """The column to be predicted, where it is one; the others are what it is predicted from."""
    encoded_once: ClassVar[bool] = True
    """Whether rows are encoded once and kept; not where inputs are far larger than rows (images, sound)."""

    @abstractmethod
    def facts(self, tables: Mapping[str, Table]) -> Facts:
        """What the rows say: label names, kind of problem.

        `tables` holds `train` and, where they exist, `validation` and `test`. Only `train` teaches; all of them are
        checked, every row. Raises `PlanError` where rows are missing something or contradict themselves.
        """

    @abstractmethod
    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        """A batch of rows (columns of equal length) as the model's inputs, `labels` included, unpadded.

        A pure function of its arguments. It may add the column `TRUNCATED`.
        """

    @abstractmethod
    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        """The function that pads examples into one batch of tensors, batch first."""

    @abstractmethod
    def score(self, predictions: Any, references: Any, names: Sequence[str], facts: Facts) -> dict[str, float]:
        """The named metrics of predictions against references, numpy arrays both, ordered by example."""

    def weight(self, batch: Mapping[str, Any]) -> int:
        """How many units the batch's mean loss is a mean over: examples here, live tokens in a language task."""
        return len(batch["labels"])

    def predict(self, outputs: Any) -> Any:
        """A model's outputs -> one prediction per example, as a tensor."""
        return outputs.logits

    def default_metrics(self, facts: Facts) -> tuple[str, ...]:
        """The metrics to compute where the recipe names none; the first decides what is best."""
        return metrics.DEFAULTS[facts.problem]

    def known_metrics(self, facts: Facts) -> tuple[str, ...]:
        """Every metric the task can compute on these data."""
        return metrics.serving(facts.problem)
