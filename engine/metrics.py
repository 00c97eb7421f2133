"""Metrics by name: what each serves, whether more of it is better, and how it is computed from a model's scores.

Works on numpy arrays alone; scikit-learn and scipy do the counting, and are imported when a metric is computed: a
second of start-up is the price of not counting ourselves. An undefined metric (one
class only, constant values, a score that is not finite) is NaN: nothing here warns, and nothing here decides what a
NaN means for a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
REGRESSION = "regression"
CLASSES = frozenset({SINGLE, MULTI})

LOSS = "loss"
"""Always computed by whoever runs the model, so legal everywhere; lower is better."""
LOWER_IS_BETTER = frozenset({LOSS, "perplexity", "wer", "cer"})
"""Of what tasks compute themselves; of all else more is better."""


@dataclass(frozen=True)
class Metric:
    """One metric."""

    serves: frozenset[str]
    """The kinds of problem it is defined for, in Hugging Face's words (`problem_type`)."""
    compute: Callable[[Any, Any], float]
    """(predictions, references) -> value; classes as ids (examples,) or 0/1 (examples, labels), numbers as floats."""
    greater_is_better: bool = True
    from_scores: bool = False
    """Whether it wants the scores themselves rather than the classes they decide for."""


def _sklearn(name: str, **arguments: Any) -> Callable[[Any, Any], float]:
    def compute(predictions: Any, references: Any) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(references, predictions, **arguments))

    return compute


def _averaged(name: str, average: str) -> Callable[[Any, Any], float]:
    """A class that is never predicted counts as 0 in the average; that is a verdict, not an undefined value."""
    return _sklearn(name, average=average, zero_division=0)


def _scipy(name: str) -> Callable[[Any, Any], float]:
    def compute(predictions: Any, references: Any) -> float:
        import scipy.stats

        return float(getattr(scipy.stats, name)(predictions, references).statistic)

    return compute


def _matthews(predictions: Any, references: Any) -> float:
    """Matthews 1975, Gorodkin 2004. Predicting one class throughout is 0; references of one class: undefined."""
    if len(set(references.tolist())) < 2:
        return float("nan")
    return _sklearn("matthews_corrcoef")(predictions, references)


def _roc_auc(scores: Any, references: Any) -> float:
    """Area under the ROC curve: of the second class for two, one-vs-rest averaged for more, averaged over labels.

    Labels that every reference has, or none, say nothing and are left out of the average over labels.
    """
    import numpy as np

    roc_auc = _sklearn("roc_auc_score")
    if references.ndim == 2:
        columns = [column for column in range(references.shape[1]) if 0 < references[:, column].mean() < 1]
        values = [roc_auc(scores[:, column], references[:, column]) for column in columns]
        return float(np.mean(values)) if values else float("nan")
    if len(set(references.tolist())) < scores.shape[1]:
        return float("nan")
    if scores.shape[1] == 2:
        return roc_auc(scores[:, 1] - scores[:, 0], references)
    return _sklearn("roc_auc_score", multi_class="ovr", average="macro")(_softmax(scores), references)


def _softmax(scores: np.ndarray) -> np.ndarray:
    import numpy as np

    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(CLASSES, _sklearn("accuracy_score")),
    "balanced_accuracy": Metric(frozenset({SINGLE}), _sklearn("balanced_accuracy_score")),
    "f1": Metric(CLASSES, _averaged("f1_score", "macro")),
    "f1_micro": Metric(CLASSES, _averaged("f1_score", "micro")),
    "f1_weighted": Metric(CLASSES, _averaged("f1_score", "weighted")),
    "precision": Metric(CLASSES, _averaged("precision_score", "macro")),
    "recall": Metric(CLASSES, _averaged("recall_score", "macro")),
    "matthews_correlation": Metric(frozenset({SINGLE}), _matthews),
    "roc_auc": Metric(CLASSES, _roc_auc, from_scores=True),
    "mse": Metric(frozenset({REGRESSION}), _sklearn("mean_squared_error"), greater_is_better=False),
    "mae": Metric(frozenset({REGRESSION}), _sklearn("mean_absolute_error"), greater_is_better=False),
    "r2": Metric(frozenset({REGRESSION}), _sklearn("r2_score")),
    "pearson": Metric(frozenset({REGRESSION}), _scipy("pearsonr")),
    "spearman": Metric(frozenset({REGRESSION}), _scipy("spearmanr")),
}
"""Every metric by name. `f1`, `precision` and `recall` are macro averages: each class counts alike. For several labels
`accuracy` wants all labels of an example right."""

DEFAULTS: Mapping[str, tuple[str, ...]] = {
    SINGLE: ("accuracy", "f1"),
    MULTI: ("f1", "f1_micro", "accuracy"),
    REGRESSION: ("mse", "mae", "r2"),  # a correlation is undefined while a model still predicts one value
}
"""What is computed where a recipe names no metric; the first decides what is best."""


def serving(problem: str) -> tuple[str, ...]:
    """The names of the metrics that serve a kind of problem."""
    return tuple(name for name, metric in METRICS.items() if problem in metric.serves)


def greater_is_better(name: str) -> bool:
    """Whether more of the metric is better; `loss` is lower-is-better."""
    return METRICS[name].greater_is_better if name in METRICS else name not in LOWER_IS_BETTER


def unserved(name: str, known: Sequence[str]) -> tuple[str, str] | None:
    """Why `name` can't judge where only the metrics `known` (and the loss) can: what is wrong, and what to write."""
    legal = (*known, LOSS)
    if name in legal:
        return None
    what = f"`{name}` doesn't fit this task" if name in METRICS else f"there is no metric `{name}`"
    near = get_close_matches(name, legal, n=1, cutoff=0.5)  # `acc` is half of `accuracy`
    return what, f"did you mean `{near[0]}`?" if near else f"one of {', '.join(legal)}"


def compute(names: Sequence[str], problem: str, scores: Any, references: Any) -> dict[str, float]:
    """The named metrics of a model's scores.

    `scores` are logits (examples, labels) or, for a regression, (examples,) or (examples, 1). `references` are ids
    (examples,), 0/1 (examples, labels) or numbers (examples,).
    """
    import numpy as np

    scores, references = np.asarray(scores, dtype=np.float64), np.asarray(references)
    if not np.isfinite(scores).all() or not len(scores):
        return dict.fromkeys(names, float("nan"))
    references = references.reshape(len(scores)) if problem == REGRESSION else references.astype(np.int64)
    decided = _decide(problem, scores)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = {name: METRICS[name] for name in names}
        return {n: m.compute(scores if m.from_scores else decided, references) for n, m in found.items()}


def confusion(problem: str, scores: Any, references: Any, labels: int) -> list[list[int]] | None:
    """How often each label (row) was taken for each (column), where every example has one of `labels`; else None."""
    import numpy as np

    if problem != SINGLE:
        return None
    scores, references = np.asarray(scores), np.asarray(references)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        return None
    counts = np.zeros((labels, labels), dtype=np.int64)
    np.add.at(counts, (references.astype(np.int64), _decide(problem, scores)), 1)
    return counts.tolist()


def _decide(problem: str, scores: np.ndarray) -> np.ndarray:
    """The class, the labels or the number that scores stand for; a label counts from a probability of one half."""
    if problem == SINGLE:
        return scores.argmax(axis=1)
    return (scores >= 0).astype(int) if problem == MULTI else scores.reshape(len(scores))
