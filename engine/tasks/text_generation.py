"""Text generation: a language model goes on with plain texts, completes prompts, or answers in chats.

What it learns to write has labels and all else has none: of a prompt and its completion the completion, of a chat what
the assistant wrote. The mean loss is one over tokens, never one over examples; of preferences it is one over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.errors import PlanError, Problem
from engine.tasks import chats, packing, preferences, texts
from engine.tasks.base import TRUNCATED, Example, Facts, Table, Task
from engine.tasks.columns import not_text, stop_at
from engine.tasks.packing import Piece
from engine.tasks.texts import IGNORED

CHAT, COMPLETION, TEXT, PREFERENCE = "chat", "completion", "text", "preference"
COLUMNS = {CHAT: ("messages",), COMPLETION: ("prompt", "completion"), TEXT: ("text",)}
"""How rows can be written, and by which columns each is known; the first whose columns are all there is taken."""


class TextGeneration(Task):
    """The next token, and the next: of plain texts, of completions to prompts, or of the assistant's turns in chats."""

    auto = "AutoModelForCausalLM"
    columns = {
        "messages": ("messages", "conversations", "conversation"),
        "tools": ("tools",),
        "prompt": ("prompt", "instruction", "question", "input"),
        "completion": ("completion", "response", "output", "answer"),
        "text": ("text", "content", "document"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    }
    optional = frozenset(columns)
    target = "completion"
    new_head = False
    windowed = True
    shifts = True

    type: Literal["text-generation"]
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of an example; 1,024 or the model's own limit, whichever is less, if left out. Plain texts go on in the
    next example, all else is cut."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """How a chat becomes one text: a file of Jinja, or the name of one of the tokenizer's own templates; its default
    if left out. It is saved with the model."""
    packing: bool = False
    """Whether short texts share an example, without seeing each other, so that little is padding."""
    objective: Literal["likelihood", "dpo"] = "likelihood"
    """What is learnt: texts as they are, or by DPO to prefer the `chosen` of two answers to the `rejected`."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """With `dpo`: how strongly it holds to the model as it was."""

    @model_validator(mode="after")
    def _unpacked_pairs(self) -> TextGeneration:
        if self.packing and self._dpo:
            raise ValueError("`packing` is for `objective: likelihood`; a pair of answers is never torn apart")
        return self

    @property
    def _dpo(self) -> bool:
        return self.objective == "dpo"

    @property
    def refers(self) -> bool:
        return self._dpo

    @property
    def streams(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self._dpo

    @property
    def smooths(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self._dpo

    @property
    def own_metrics(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return preferences.METRICS if self._dpo else ("perplexity", "token_accuracy")

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        there = tables["train"].columns
        known = {PREFERENCE: preferences.SIDES} if self._dpo else COLUMNS
        form = next((form for form, names in known.items() if all(name in there for name in names)), None)
        if form is None:
            wanted = "`chosen` and `rejected`" if self._dpo else "`text`, `prompt` and `completion`, or `messages`"
            then = f"write `columns: {{{'chosen' if self._dpo else 'text'}: ...}}` or the like"
            raise PlanError([Problem(("data", "columns"), f"no columns look like {wanted}", then)])
        for table in tables.values():
            stop_at(_problems(table, form))
        chatty = form == CHAT or (form == PREFERENCE and chats.looks_like(tables["train"], "chosen"))
        if self.chat_template and not chatty:
            what = f"`{self.chat_template}` makes one text of a chat, and the data hold {form} rows"
            raise PlanError([Problem(("task", "chat_template"), what, "leave the key out")])
        used = (*known[form], *(["prompt"] if self._dpo else []), *(["tools"] if form == CHAT else []))
        rest = [f"`{name}`" for name in there if name not in used]
        taken = " and ".join(f"`{name}`" for name in known[form])
        notes = (f"trains on {taken}, not on {', '.join(rest)}",) if rest else ()
        return Facts(form=form, notes=notes, members=2 if self._dpo else 1)

    def equip(self, processor: Any, root: Path) -> None:
        if self.chat_template:
            chats.equip(processor, self.chat_template, root)

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        most = self._most(processor)
        form, rows = preferences.halves(rows) if self._dpo else (facts.form, rows)
        pieces, lost = {CHAT: _chats, COMPLETION: _completions, TEXT: _texts}[form](rows, processor, most)
        if not self.packing:
            ids, labels = zip(*pieces, strict=True)
            return {"input_ids": list(ids), "labels": list(labels), TRUNCATED: lost}
        groups = packing.pack([len(ids) for ids, _ in pieces], most)
        packed = [packing.joined([pieces[at] for at in group]) for group in groups]
        columns = {name: [example[name] for example in packed] for name in packed[0]}
        return {**columns, TRUNCATED: [any(lost[at] for at in group) for group in groups]}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch

        eights = texts.multiple(processor, self._most(processor)) or 1
        padding = {"input_ids": processor.pad_token_id, "attention_mask": 0, "labels": IGNORED}

        def batch(examples: Sequence[Example]) -> Mapping[str, Any]:
            width = -(-max(len(example["input_ids"]) for example in examples) // eights) * eights
            rows: dict[str, list[list[int]]] = {}
            for example in examples:
                short = width - len(example["input_ids"])
                packed = "position_ids" in example
                mask = {} if packed else {"attention_mask": [1] * len(example["input_ids"])}
                for name, values in {**example, **mask}.items():
                    if name == preferences.REFERENCE:
                        rows.setdefault(name, []).append(values)
                        continue
                    # what pads a packed example is a text of its own, which nothing else sees
                    more = range(short) if name == "position_ids" else [padding[name]] * short
                    rows.setdefault(name, []).append([*values, *more])
            return {name: torch.tensor(values) for name, values in rows.items()}

        return batch

    def trim(self, model: Any) -> None:
        if self.packing:
            packing.refuse_leaks(model)

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        beside = {"labels", preferences.REFERENCE} if self._dpo else set()
        # keys and values serve writing alone, and with them packed texts would see each other
        return {**{name: value for name, value in batch.items() if name not in beside}, "use_cache": False}

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        outputs = model(**self.inputs(batch))
        if self._dpo:
            from torch.nn.functional import logsigmoid

            found = preferences.likelihoods(outputs.logits, batch["labels"])
            outputs["margins"] = preferences.margins(found, batch[preferences.REFERENCE], self.beta)
            outputs["loss"] = -logsigmoid(outputs["margins"]).mean()
        return outputs

    def reference(self, outputs: Any, batch: Mapping[str, Any]) -> Sequence[float]:
        return preferences.likelihoods(outputs.logits, batch["labels"]).tolist()

    def weight(self, batch: Mapping[str, Any]) -> int:
        return len(batch["labels"]) // 2 if self._dpo else int((batch["labels"][:, 1:] != IGNORED).sum())

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Per example (surprise in nats, tokens guessed right) over its live tokens, and how many those are.

        Of preferences: the margin of each pair, which has to be above 0.
        """
        from torch.nn.functional import cross_entropy

        if self._dpo:
            return outputs["margins"].tolist(), [0.0] * len(outputs["margins"])
        found, counts = [], []
        for scores, labels in zip(outputs.logits[:, :-1], batch["labels"][:, 1:], strict=True):
            # one example at a time and live tokens alone: in float32, a batch of logits would need twice its memory
            scores, labels = scores[labels != IGNORED].float(), labels[labels != IGNORED]
            surprise = float(cross_entropy(scores, labels, reduction="sum")) if len(labels) else 0.0
            found.append((surprise, int((scores.argmax(-1) == labels).sum())))
            counts.append(len(labels))
        return found, counts

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        if self._dpo:
            return preferences.score(predictions, names)
        live = sum(references)
        surprise, hits = (float(sum(each)) for each in zip(*predictions, strict=True))
        if not live or not surprise / live < 700:  # the exponential of more is beyond a float
            return dict.fromkeys(names, float("nan"))
        found = {"perplexity": exp(surprise / live), "token_accuracy": hits / live}
        return {name: found[name] for name in names}

    def _most(self, processor: Any) -> int:
        own = texts.limit(self.max_length, processor) or texts.DEFAULT_LENGTH
        return self.max_length or min(own, texts.DEFAULT_LENGTH)


def _problems(table: Table, form: str) -> list[Problem | None]:
    if form == PREFERENCE:
        return preferences.bad_rows(table)
    if form == CHAT:
        return [chats.bad_chats(table), chats.bad_tools(table)]
    return [not_text(table, name) for name in COLUMNS[form]]


def _texts(rows: Mapping[str, Sequence[Any]], processor: Any, most: int) -> tuple[list[Piece], list[bool]]:
    """Plain texts, each closed by the token that ends a text; a long one goes on in the next piece."""
    encoded = processor(list(rows["text"]), verbose=False)["input_ids"]
    pieces = [piece for ids in encoded for piece in packing.windows(texts.closed(ids, processor), most)]
    return [(ids, list(ids)) for ids in pieces], [False] * len(pieces)


def _completions(rows: Mapping[str, Sequence[Any]], processor: Any, most: int) -> tuple[list[Piece], list[bool]]:
    if processor.eos_token_id is None:
        what = "the tokenizer has no token that ends a text, so nothing would teach the model where to stop"
        raise PlanError([Problem(("model", "path"), what, "take one that has an `eos_token`")])
    pieces, lost = [], []
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        given, ids = _completed(prompt, completion, processor)
        pieces.append((ids[:most], [IGNORED] * min(given, most) + ids[given:most]))
        lost.append(len(ids) > most)
    return pieces, lost


def _completed(prompt: str, completion: str, processor: Any) -> tuple[int, list[int]]:
    """How many tokens the prompt has, and those of both, up to the end.

    Where the two as one text would merge a token across their border, each is encoded by itself: that is what the
    model meets when it is given the prompt alone.
    """
    given = _open(processor(prompt, verbose=False)["input_ids"], processor)
    both = _open(processor(prompt + completion, verbose=False)["input_ids"], processor)
    if both[: len(given)] != given:
        both = given + processor(completion, add_special_tokens=False, verbose=False)["input_ids"]
    return len(given), texts.closed(both, processor)


def _open(ids: list[int], processor: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == processor.eos_token_id else ids


def _chats(rows: Mapping[str, Sequence[Any]], processor: Any, most: int) -> tuple[list[Piece], list[bool]]:
    texts.need_fast(processor, "what the assistant wrote")
    pieces, lost = [], []
    tools = rows.get("tools") or [None] * len(rows["messages"])
    told = [chats.plain(chat) for chat in rows["messages"]]
    for ids, live in chats.all_tokens(told, processor, [chats.listed(each) for each in tools]):
        labels = [token if alive else IGNORED for token, alive in zip(ids, live, strict=True)]
        pieces.append((ids[:most], labels[:most]))
        lost.append(len(ids) > most)
    return pieces, lost
