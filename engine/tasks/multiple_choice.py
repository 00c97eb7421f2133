"""Multiple choice: which of some continuations or answers is the right one.

Every choice goes through the model by itself, beside its question; only the loss sets them against one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.errors import Problem
from engine.tasks import texts
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import bad_rows, missing, not_lists, not_text, stop_at, wrong_kind

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoice(Task):
    """The right one of some choices, as many in every row."""

    auto = "AutoModelForMultipleChoice"
    columns = {
        "context": ("context", "article", "passage", "support"),
        "question": ("question", "prompt", "premise", "sentence", "startphrase", "query", "ctx"),
        "choices": ("choices", "options", "endings", "answers"),
        "label": ("label", "answer", "labels", "answerKey", "gold"),
    }
    optional = frozenset({"context"})
    target = "label"
    smooths = False
    own_metrics = ("accuracy",)

    type: Literal["multiple-choice"]
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which a question and a choice are cut; the model's own limit if left out."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        given = [name for name in ("context", "question") if name in tables["train"].columns]
        stop_at(not_text(table, name) for table in tables.values() for name in given)
        stop_at(not_lists(table, "choices", "text") or missing(table, "label") for table in tables.values())
        count = len(tables["train"].columns["choices"][0])
        stop_at(_uneven(table, count) for table in tables.values())
        stop_at(_not_a_choice(table) for table in tables.values())
        return Facts(members=count, notes=(f"{count} choices a row: chance is {1 / count:.1%}",))

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        firsts, seconds, right = [], [], []
        for index, (question, choices) in enumerate(zip(rows["question"], rows["choices"], strict=True)):
            context = rows["context"][index] if "context" in rows else None
            firsts += [context or question] * len(choices)
            seconds += [f"{question} {choice}" if context else choice for choice in choices]
            answer = chosen(rows["label"][index], choices)
            right += [int(place == answer) for place in range(len(choices))]
        most = texts.limit(self.max_length, processor)
        encoded = processor(firsts, seconds, truncation=most is not None, max_length=most)
        return {**encoded, **texts.truncated(encoded), "labels": right}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        return texts.padder(processor, texts.limit(self.max_length, processor))

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Each choice as an example that has one choice (texts, 1, tokens)."""
        return {key: value[:, None] for key, value in batch.items() if key != "labels"}

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        from torch.nn.functional import cross_entropy

        outputs = model(**self.inputs(batch))
        right = _together(batch["labels"])
        outputs["logits"] = outputs.logits.view(right.shape)
        outputs["loss"] = cross_entropy(outputs.logits.float(), right.argmax(1))
        return outputs

    def weight(self, batch: Mapping[str, Any]) -> int:
        return len(_together(batch["labels"]))

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The scores of all choices, (choices,) each, and the number of the right one."""
        return outputs.logits.float().cpu().numpy(), _together(batch["labels"]).argmax(1).cpu().numpy()

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        import numpy as np

        scores = np.stack(predictions)
        if not np.isfinite(scores).all():
            return dict.fromkeys(names, float("nan"))
        return {name: float((scores.argmax(1) == np.asarray(references)).mean()) for name in names}


def _together(flags: Any) -> Any:
    """The flags of right choices, example by example (examples, choices): each example has exactly one."""
    return flags.view(int(flags.sum()), -1)


def chosen(label: Any, choices: Sequence[str]) -> int | None:
    """The number of the right choice: a label is that number, a letter, or the choice itself; None for none of them."""
    if isinstance(label, str) and label in choices:
        return list(choices).index(label)
    if isinstance(label, str) and len(label) == 1 and label in LETTERS:
        label = LETTERS.index(label)
    try:
        number = int(label)
    except ValueError:
        return None
    return number if 0 <= number < len(choices) else None


def _uneven(table: Table, count: int) -> Problem | None:
    import pyarrow.compute as pc

    other = pc.not_equal(pc.list_value_length(table.columns["choices"]), count)
    what = f"`choices` are not {count} as in the first training row"
    return bad_rows(table, "choices", other, what, "give every row as many, or leave the row out")


def _not_a_choice(table: Table) -> Problem | None:
    import pyarrow as pa

    if mixed := wrong_kind(table, "label"):
        return mixed
    rows = zip(table.columns["label"].to_pylist(), table.columns["choices"].to_pylist(), strict=True)
    strange = [chosen(label, choices) is None for label, choices in rows]
    if not any(strange):
        return None
    said = f"`label` is {str(table.columns['label'][strange.index(True)].as_py())[:60]}, which is none of the choices"
    advice = "write its number from 0 on, its letter, or the choice itself"
    return bad_rows(table, "label", pa.chunked_array([strange]), said, advice)
