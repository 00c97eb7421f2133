"""What summarization and translation share: a model that reads one text and writes another.

The loss compares token by token with the text it should have written; the metrics judge what it writes by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar

from pydantic import Field

from engine.errors import PlanError, Problem
from engine.tasks import texts
from engine.tasks.base import TRUNCATED, Example, Facts, Task
from engine.tasks.texts import IGNORED


class Written(Task):
    """A text that is written after another one was read."""

    auto = "AutoModelForSeq2SeqLM"
    new_head = False
    streams = True
    writes = True
    library: ClassVar[tuple[str, str]]
    """The package that computes the metrics, and the module that it brings."""

    source_prefix: str = ""
    """What stands before every text, e.g. `"summarize: "` for a T5."""
    max_source_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which the text that is read is cut; 1,024 or the model's own limit, whichever is less, if left out.
    """
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens after which the text that is written is cut, in training and when it is judged."""
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Beams of the search for what is written when it is judged; 1 takes the likeliest token each time."""

    @abstractmethod
    def pairs(self, rows: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str]]:
        """The texts to read, and those to write."""

    def need_library(self) -> None:
        """Raise `PlanError` where the package that computes the metrics is not installed."""
        package, module = self.library
        if find_spec(module) is None:
            kind: str = self.type  # pyright: ignore[reportAttributeAccessIssue]
            what = f"{kind} is judged by the package `{package}`, which is not installed"
            raise PlanError([Problem(("task", "type"), what, f"run `pip install frostline[{kind}]`")])

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        self._refuse_languages(processor)
        read, write = self.pairs(rows)
        source = processor(
            [self.source_prefix + text for text in read], truncation=True, max_length=self._most(processor)
        )
        target = processor(text_target=write, truncation=True, max_length=self.max_target_length)
        labels = [texts.closed(ids, processor)[: self.max_target_length] for ids in target["input_ids"]]
        cut = [texts.truncated(each).get(TRUNCATED, [False] * len(read)) for each in (source, target)]
        lost = {TRUNCATED: [any(both) for both in zip(*cut, strict=True)]}
        taken = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"]}
        return {**taken, "labels": labels, **lost}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        from transformers import DataCollatorForSeq2Seq

        eights = texts.multiple(processor, self._most(processor))
        # The decoder's inputs are the labels shifted, which every such model does by itself.
        pad = DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED, pad_to_multiple_of=eights)
        return lambda examples: dict(pad([dict(example) for example in examples]))

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**batch, "use_cache": False}  # keys and values serve writing alone

    def weight(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        return [None] * len(batch["labels"]), [None] * len(batch["labels"])

    def write(self, model: Any, batch: Mapping[str, Any], processor: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        how = {"max_new_tokens": self.max_target_length, "num_beams": self.num_beams, "do_sample": False}
        ids = model.generate(**inputs, **how)
        labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, processor.pad_token_id)
        return _plain(processor, ids), _plain(processor, labels)

    def _most(self, processor: Any) -> int:
        own = texts.limit(None, processor) or texts.DEFAULT_LENGTH
        if self.max_source_length and self.max_source_length > own and texts.limit(None, processor):
            what = f"the model reads {own:,} tokens at most, not {self.max_source_length:,}"
            raise PlanError([Problem(("task", "max_source_length"), what, f"write {own} or leave the key out")])
        return self.max_source_length or min(own, texts.DEFAULT_LENGTH)

    def _refuse_languages(self, processor: Any) -> None:
        if hasattr(processor, "src_lang"):
            what = "this model knows its languages by tokens (mBART, NLLB, M2M-100), which no key sets yet"
            raise PlanError([Problem(("model", "path"), what, "take a model of one pair of languages, or a T5")])


def _plain(processor: Any, ids: Any) -> list[str]:
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
