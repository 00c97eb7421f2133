"""Chats as tokens, and which of them the assistant wrote: by the tokenizer's own template, and never by a guess.

A template that marks what the assistant wrote (`{% generation %}`) is believed. Of any other, a chat is rendered up to
each turn of the assistant and beyond it: what the turn adds is the assistant's. Where a template makes that ambiguous,
the chat is refused, for a mask that is off by a few tokens trains without any error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import Key, PlanError, Problem
from engine.tasks.base import Table
from engine.tasks.columns import missing, wrong_kind
from engine.tasks.confined import ConfinedError, confined

Message = Mapping[str, Any]
KEY: Key = ("data", "columns")
ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What opens the assistant's words in a template, in transformers' dialect of Jinja."""
FORM = "`[{role: user, content: ...}, {role: assistant, content: ...}]`"


def looks_like(table: Table, name: str) -> bool:
    """Whether a column holds lists, as chats are."""
    import pyarrow as pa

    kind = table.columns[name].type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def bad_chats(table: Table, name: str = "messages") -> Problem | None:
    """The problem of a column that isn't chats throughout; each has a turn of the assistant."""
    column = table.columns[name]
    if problem := wrong_kind(table, name) or missing(table, name):
        return problem
    if not looks_like(table, name):
        what = f"{table.name}: `{name}` holds {column.type} values, not lists of messages"
        return Problem((*KEY, name), what, f"write {FORM}")
    for index, chat in enumerate(column):
        if wrong := _wrong(chat.as_py()):
            return Problem((*KEY, name), f"{table.row(index)}: {wrong}", f"write {FORM}")
    return None


def _wrong(chat: list[Any]) -> str:
    for message in chat:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return "a message has no `role` or no `content`"
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return "`role` and `content` of a message are texts"
        if message["role"] == ASSISTANT and not message["content"].strip():
            return "a turn of the assistant is empty"
    return "" if any(message["role"] == ASSISTANT for message in chat) else "the assistant says nothing"


def all_tokens(chats: Sequence[Sequence[Message]], processor: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """`tokens` of each chat, in a process that a template can't keep busy or make large beyond measure."""
    answers = confined(lambda chat: _told(chat, processor), chats)
    for chat in chats:
        try:
            said = next(answers)
        except ConfinedError as error:
            what = f"the model's chat template {error} for {_named(chat)}"
            raise PlanError([Problem(KEY, what, "look at the template, or take another model")]) from error
        if isinstance(said, dict):
            raise PlanError([Problem(tuple(said["key"]), said["what"], said["next"])])
        yield tuple(said)


def _told(chat: Sequence[Message], processor: Any) -> Any:
    """The tokens of a chat, or what is wrong with it, as JSON can hold it."""
    try:
        return tokens(chat, processor)
    except PlanError as error:
        (problem,) = error.problems
        return {"key": problem.key, "what": problem.what, "next": problem.next}


def tokens(chat: Sequence[Message], processor: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and of each whether the assistant wrote it, the token that ends its turn included.

    Raises `PlanError` where the template refuses the chat, or leaves open what the assistant wrote.
    """
    messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
    if MARKED.search(template(processor)):
        found = _rendered(messages, processor, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], [bool(live) for live in found["assistant_masks"]]
    text = _rendered(messages, processor)
    encoded = processor(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    live = [False] * len(ids)
    for start, end in _spans(messages, text, processor):
        inside = [at for at, (left, right) in enumerate(places) if right > start and left < end and left < right]
        for at in _until_the_end(inside, ids, places, text[:end], processor):
            live[at] = True
    return ids, live


def template(processor: Any) -> str:
    """The tokenizer's chat template; raises `PlanError` where it has none, or several and none by default."""
    try:
        return processor.get_chat_template()
    except ValueError as error:
        what = "the tokenizer of this model has no chat template, so a chat can't become one text"
        then = "take a model that was made for chats, or put a `chat_template.jinja` beside its tokenizer"
        raise PlanError([Problem(("model", "path"), what, then)]) from error


def _spans(messages: Sequence[Message], text: str, processor: Any) -> Iterator[tuple[int, int]]:
    """Where in the rendered text each turn of the assistant begins, after its header, and ends."""
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _rendered(messages[:index], processor, add_generation_prompt=True)
        after = _rendered(messages[: index + 1], processor)
        if not (after.startswith(before) and text.startswith(after)):
            raise _ambiguous(messages, "writes a turn otherwise where another follows")
        said, content = after[len(before) :], message["content"].strip()
        prompted = before != _rendered(messages[:index], processor)
        if not prompted and not said.lstrip().startswith(content):
            raise _ambiguous(messages, "has no generation prompt, yet a header before the assistant's words")
        if said.rstrip().endswith(content):
            raise _ambiguous(messages, "writes nothing that ends the assistant's turn")
        yield len(before), len(after)


def _until_the_end(
    inside: list[int], ids: Sequence[int], places: Sequence[tuple[int, int]], text: str, processor: Any
) -> list[int]:
    """The tokens of a turn up to the one that ends it: a model that has written that stops, and no newline follows."""
    special = set(processor.all_special_ids) | set(processor.added_tokens_decoder)
    last = next((at for at in reversed(inside) if ids[at] in special), None)
    if last is None or text[places[last][1] :].strip():
        return inside
    return [at for at in inside if at <= last]


def _rendered(messages: Sequence[Message], processor: Any, **how: Any) -> Any:
    from jinja2 import TemplateError

    how = {"tokenize": False, **how}
    try:
        return processor.apply_chat_template(list(messages), **how)
    except (TemplateError, TypeError) as error:
        what = f"the model's chat template refuses {_named(messages)}: {error}"
        raise PlanError([Problem(KEY, what, "change the row, or leave it out")]) from error


def _ambiguous(messages: Sequence[Message], why: str) -> PlanError:
    what = f"the model's chat template {why}, so what the assistant wrote in {_named(messages)} can't be told"
    return PlanError([Problem(KEY, what, "mark it in the template with `{% generation %}`, or cut chats to one turn")])


def _named(messages: Sequence[Message]) -> str:
    first = " ".join(messages[0]["content"].split()) if messages else ""
    return f"the chat that begins with `{first[:60]}`"
