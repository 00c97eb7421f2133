"""Extractive question answering: the span of a context that answers a question (SQuAD, Rajpurkar et al. 2016, 2018).

A context that is longer than the model reads is cut into windows that overlap; each window is an example to train on,
and all windows of a row are judged as one answer. It finds spans and never writes an answer of its own.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.errors import PlanError, Problem
from engine.tasks import texts
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import missing, not_text, stop_at, wrong_kind

KEPT = ("begins", "null", "starts", "ends", "context", "answers")
"""Columns of a window that only the judging reads: whether it is the first of its row, the place that stands for no
answer, each token's characters in the context (-1 for tokens of the question), the context, the right answers."""
SQUAD = "`{text: [...], answer_start: [...]}`"
SOME_UNANSWERED = "some without an answer"


class QuestionAnswering(Task):
    """The span of a context that answers a question, or none where the data have questions without an answer."""

    auto = "AutoModelForQuestionAnswering"
    columns = {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "document"),
        "answers": ("answers", "answer"),
    }
    target = "answers"
    windowed = True
    smooths = False
    own_metrics = ("f1", "exact_match")

    type: Literal["question-answering"]
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of a window, question included; 384 or the model's own limit, whichever is less, if left out."""
    stride: Annotated[int, Field(ge=0)] = 128
    """Tokens of the context that a window shares with the one before."""
    max_answer_length: Annotated[int, Field(ge=1)] = 30
    """Most tokens of an answer that is given."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        stop_at(not_text(table, name) for table in tables.values() for name in ("question", "context"))
        stop_at(_bad_answers(table) for table in tables.values())
        answers = tables["train"].columns["answers"].to_pylist()
        without = sum(not row["text"] for row in answers)
        note = f"{without:,} of {len(answers):,} training questions have no answer in their context"
        settings = {"num_labels": 2}  # a start and an end, however many classes the checkpoint knew
        return Facts(form=SOME_UNANSWERED if without else "", notes=(note,) if without else (), settings=settings)

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        texts.need_fast(processor, "an answer's place")
        most = self._window(processor)
        questions = [question.strip() for question in rows["question"]]
        self._room(processor, questions, most)
        encoded = processor(
            questions,
            list(rows["context"]),
            truncation="only_second",
            max_length=most,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        windows = [
            _window(encoded["input_ids"][i], offsets[i], encoded.sequence_ids(i), processor.cls_token_id)
            | {"begins": int(i == 0 or owner != owners[i - 1]), "context": rows["context"][owner]}
            | {"answers": list(rows["answers"][owner]["text"])}
            for i, owner in enumerate(owners)
        ]
        spans = [_span(window, rows["answers"][owner]) for window, owner in zip(windows, owners, strict=True)]
        return {
            **encoded,
            "start_positions": [start for start, _ in spans],
            "end_positions": [end for _, end in spans],
            **{name: [window[name] for window in windows] for name in KEPT},
        }

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        pad = texts.padder(processor, self._window(processor))

        def collate(examples: Sequence[Example]) -> Mapping[str, Any]:
            batch = pad([{key: value for key, value in example.items() if key not in KEPT} for example in examples])
            # Positions count from the first token, which padding on the left moves.
            batch["start_positions"] += batch["attention_mask"].argmax(1)
            batch["end_positions"] += batch["attention_mask"].argmax(1)
            return {**batch, "kept": [{key: example[key] for key in KEPT} for example in examples]}

        return collate

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions", "kept")}

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """The model's own loss would let padding take part, so that a window's loss hung on the batch it is in."""
        from torch.nn.functional import cross_entropy

        outputs = model(**self.inputs(batch))
        padding = batch["attention_mask"] == 0
        losses = []
        for side in ("start", "end"):
            logits = outputs[f"{side}_logits"].float().masked_fill(padding, -1e9)
            losses.append(cross_entropy(logits, batch[f"{side}_positions"]))
        outputs["loss"] = sum(losses) / 2
        return outputs

    def weight(self, batch: Mapping[str, Any]) -> int:
        return len(batch["start_positions"])

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Per window (score of no answer, score of the best span, its text), and (whether it begins a row, answers)."""
        live = batch["attention_mask"].bool().cpu().numpy()
        scores = [outputs[f"{side}_logits"].float().cpu().numpy() for side in ("start", "end")]
        rows = zip(*scores, live, batch["kept"], strict=True)
        found = [best_span(start[mask], end[mask], kept, self.max_answer_length) for start, end, mask, kept in rows]
        return found, [(kept["begins"], tuple(kept["answers"])) for kept in batch["kept"]]

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        rows = list(_rows(predictions, references, facts.form == SOME_UNANSWERED))
        kinds = {"f1": overlap, "exact_match": lambda given, right: float(_words(given) == _words(right))}
        return {
            name: sum(max(kinds[name](given, right) for right in answers or ("",)) for given, answers in rows)
            / len(rows)
            for name in names
        }

    def _window(self, processor: Any) -> int:
        own = texts.limit(self.max_length, processor)
        return self.max_length or min(own or 384, 384)

    def _room(self, processor: Any, questions: Sequence[str], most: int) -> None:
        """Raise `PlanError` where a question leaves its context no room to move on."""
        special = processor.num_special_tokens_to_add(pair=True)
        longest = max(map(len, processor(questions, add_special_tokens=False)["input_ids"]))
        if (room := most - special - longest) <= self.stride:
            what = f"a question of {longest} tokens leaves {max(room, 0)} of a window of {most} to its context"
            advice = f"raise `max_length`, or set `stride`, now {self.stride}, below what is left"
            raise PlanError([Problem(("task", "max_length"), what, advice)])


def _bad_answers(table: Table) -> Problem | None:
    """The problem of the first row whose answers don't stand in its context where it says."""
    if problem := wrong_kind(table, "answers", dict, SQUAD) or missing(table, "answers"):
        return problem
    rows = zip(table.columns["answers"].to_pylist(), table.columns["context"].to_pylist(), strict=True)
    for index, (answers, context) in enumerate(rows):
        if what := _bad_answer(answers, context):
            return Problem(("data", "columns", "answers"), f"{table.row(index)}: {what}")
    return None


def _bad_answer(answers: Any, context: str) -> str:
    lists = [answers.get(key) for key in ("text", "answer_start")] if isinstance(answers, dict) else []
    if len(lists) < 2 or not all(isinstance(each, list) for each in lists) or len(lists[0]) != len(lists[1]):
        return f"`answers` has to be {SQUAD}, with a start for each text"
    for text, start in zip(*lists, strict=True):
        if not text or start is None or context[int(start) : int(start) + len(text)] != text:
            return f"the answer `{str(text)[:60]}` doesn't stand at character {start} of `context`"
    return ""


def _window(ids: Sequence[int], offsets: Sequence[Any], sides: Sequence[int | None], cls: int | None) -> dict[str, Any]:
    """What the judging needs to know of a window's tokens."""
    starts = [start if side == 1 else -1 for (start, _), side in zip(offsets, sides, strict=True)]
    ends = [end if side == 1 else -1 for (_, end), side in zip(offsets, sides, strict=True)]
    return {"null": list(ids).index(cls) if cls in ids else 0, "starts": starts, "ends": ends}


def _span(window: Mapping[str, Any], answers: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of a row's first answer; the place of no answer where it isn't wholly in the window."""
    if not answers["text"]:
        return window["null"], window["null"]
    start = int(answers["answer_start"][0])
    end = start + len(answers["text"][0])
    places = [i for i, at in enumerate(window["starts"]) if 0 <= at < end and window["ends"][i] > start]
    if not places or window["starts"][places[0]] > start or window["ends"][places[-1]] < end:
        return window["null"], window["null"]
    return places[0], places[-1]


def best_span(start: Any, end: Any, kept: Mapping[str, Any], most: int) -> tuple[float, float, str]:
    """(score of no answer, score of the best span of at most `most` tokens, its text) of one window, no padding in it.

    `start` and `end` are scores (tokens,). Every span is looked at: a window has few enough of them.
    """
    import numpy as np

    live = np.asarray(kept["starts"]) >= 0
    spans = np.triu(start[:, None] + end[None, :])
    allowed = np.triu(np.outer(live, live)) & ~np.triu(np.ones(spans.shape, dtype=bool), most)
    null = float(start[kept["null"]] + end[kept["null"]])
    if not allowed.any():
        return null, -np.inf, ""
    first, last = np.unravel_index(np.where(allowed, spans, -np.inf).argmax(), spans.shape)
    return null, float(spans[first, last]), kept["context"][kept["starts"][first] : kept["ends"][last]]


def _rows(
    predictions: Sequence[Any], references: Sequence[Any], unanswered: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Per row of the data: the best answer of all its windows, and the right ones."""
    begins = [index for index, (first, _) in enumerate(references) if first]
    for here, there in zip(begins, [*begins[1:], len(references)], strict=True):
        windows = predictions[here:there]
        _, score, text = max(windows, key=lambda window: window[1])
        nothing = unanswered and min(null for null, _, _ in windows) > score
        yield "" if nothing else text, references[here][1]


def _words(text: str) -> list[str]:
    """An answer's words as SQuAD's own script compares them: no case, punctuation or articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def overlap(given: str, right: str) -> float:
    """F1 of the words that two answers share; 1 where neither has any."""
    ours, theirs = _words(given), _words(right)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))
