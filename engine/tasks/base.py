"""What every task is: its keys in a recipe, and the few verbs that turn rows into losses and metrics.

A task is a part of the recipe and nothing else holds its state; whatever it learns about the data is a `Facts` value.
Torch, transformers, pyarrow and scikit-learn are imported inside the verbs, so that reading a recipe stays cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine import metrics
from engine.part import Part

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

Example = dict[str, Any]
"""One example as the model takes it, unpadded, labels included."""

TRUNCATED = "truncated"
"""A column of encoded rows that is no input: whether a row lost its end. It is counted and dropped."""
SEED = "seed"
"""Added to an example that is trained on where a task draws at random: all that its draws may follow from."""


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
    members: int = 1
    """Encoded rows that make one example together, one after the other: the choices of a question, the texts of a
    pair. Each of them goes through the model by itself; an example is never torn apart."""


class Task(Part, ABC):
    """One thing people fine-tune for, named by the Hub's pipeline tag."""

    auto: ClassVar[str]
    """Name of the transformers auto class, e.g. `AutoModelForSequenceClassification`."""
    processor: ClassVar[str] = "AutoTokenizer"
    """Name of the transformers class that prepares inputs."""
    processor_settings: ClassVar[Mapping[str, Any]] = {}
    """What its `from_pretrained` is told beside the model's name."""
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
    windowed: ClassVar[bool] = False
    """Whether a long row becomes several examples, so that examples can only be counted once they are encoded."""
    streams: ClassVar[bool] = False
    """Whether rows may be trained on that `facts` has not seen: nothing of the task follows from all of them."""
    smooths: ClassVar[bool] = True
    """Whether `label_smoothing_factor` means something: the loss compares `logits` with `labels`, class by class."""
    shifts: ClassVar[bool] = False
    """Whether `logits` at one token are about the label of the next."""
    writes: ClassVar[bool] = False
    """Whether the metrics judge what the model writes by itself, so that `write` gives an evaluation's answers."""
    own_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that `score` computes itself, the one that decides first; empty where `engine.metrics` serves."""

    @abstractmethod
    def facts(self, tables: Mapping[str, Table]) -> Facts:
        """What the rows say: label names, kind of problem.

        `tables` holds `train` and, where they exist, `validation` and `test`. Only `train` teaches; all of them are
        checked, every row. Raises `PlanError` where rows are missing something or contradict themselves.
        """

    @property
    def draws(self) -> bool:
        """Whether `collate` draws at random for examples that are trained on (masks, augmentation).

        It draws from an example's `SEED` alone, and nothing but what follows from the example where there is none.
        Nothing that was drawn is ever kept in a cache.
        """
        return False

    @property
    def refers(self) -> bool:
        """Whether each encoded row needs to know what the model made of it before anything trained: a `reference`."""
        return False

    def reference(self, outputs: Any, batch: Mapping[str, Any]) -> Sequence[float]:
        """One number for each row, of the model's outputs on `inputs(batch)`; kept as the column `reference`."""
        raise TypeError(f"{type(self).__name__} refers to nothing")

    @abstractmethod
    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        """A batch of rows (columns of equal length) as the model's inputs, `labels` included, unpadded.

        A pure function of its arguments. It may add the column `TRUNCATED`, and columns that `collate` drops or that
        only `answers` reads. Rows may be more than came in: `members` for each, or `windowed`.
        """

    def equip(self, processor: Any, root: Path) -> None:
        """Give a processor what the recipe says of it; files lie below `root`. By default nothing.

        Raises `PlanError` where it can't be had.
        """

    def fit(self, splits: Mapping[str, Dataset], processor: Any) -> None:
        """Raise `PlanError` where rows that are encoded as they are read don't fit the processor; asked once."""

    @abstractmethod
    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        """The function that pads examples into one batch of tensors, batch first."""

    @abstractmethod
    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        """The named metrics of what `answers` gave for every example of a split, in the split's order."""

    def trim(self, model: Any) -> None:
        """Take off what the task has no use for, of a real model as of its skeleton; by default nothing.

        Raises `PlanError` where the task can't be had with this model.
        """

    def accompany(self, folder: Path) -> None:
        """Write beside a saved model what others need to use it as it was trained; by default nothing."""

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a batch the model itself takes."""
        return batch

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """One forward pass: outputs whose `loss` is a mean over the batch's `weight` units."""
        return model(**self.inputs(batch))

    def served(self, outputs: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What an exported graph of the model gives, by name: the model's own outputs on what it takes."""
        return outputs

    def confusion(self, predictions: Any, references: Any, facts: Facts) -> list[list[int]] | None:
        """How often each label (row) was taken for each (column), or None where examples don't have one label each."""
        return metrics.confusion(facts.problem, predictions, references, len(facts.labels))

    def weight(self, batch: Mapping[str, Any]) -> int:
        """How many units the batch's mean loss is a mean over: examples here, live tokens in a language task."""
        return len(batch["labels"])

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Predictions and references, one of each per example: small values on the CPU, of whatever kind and length.

        They are kept for a whole split, so nothing as large as a vocabulary is handed on for every token.
        """
        return outputs.logits.float().cpu().numpy(), batch["labels"].cpu().numpy()

    def write(self, model: Any, batch: Mapping[str, Any], processor: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """What the model writes by itself for a batch, and what it should: `answers` of a task that `writes`."""
        raise TypeError(f"{type(self).__name__} writes nothing")

    def default_metrics(self, facts: Facts) -> tuple[str, ...]:
        """The metrics to compute where the recipe names none; the first decides what is best."""
        return self.own_metrics or metrics.DEFAULTS[facts.problem]

    def known_metrics(self, facts: Facts) -> tuple[str, ...]:
        """Every metric the task can compute on these data."""
        return self.own_metrics or metrics.serving(facts.problem)
