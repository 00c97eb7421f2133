"""Chats as tokens, and which of them the assistant wrote: by the tokenizer's own template, and never by a guess.

A template that marks what the assistant wrote (`{% generation %}`) is believed. Of any other, a chat is rendered up to
each turn of the assistant and beyond it: what the turn adds is the assistant's. Where a template makes that ambiguous,
the chat is refused, for a mask that is off by a few tokens trains without any error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import Key, PlanError, Problem
from engine.tasks.base import Table
from engine.tasks.columns import missing, wrong_kind
from engine.tasks.confined import ConfinedError, confined

Message = Mapping[str, Any]
Tools = Sequence[Any] | None
"""What the assistant may call, as the functions' JSON schemas."""
KEY: Key = ("data", "columns")
ASSISTANT = "assistant"
TEMPLATE: Key = ("task", "chat_template")
LONGEST = 2**18
"""Bytes of a template; the longest that are known have a tenth of it."""
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What opens the assistant's words in a template, in transformers' dialect of Jinja."""
MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
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
        if wrong := _wrong([_decoded(message) for message in chat.as_py()]):
            return Problem((*KEY, name), f"{table.row(index)}: {wrong}", f"write {FORM}")
    return None


def _decoded(message: Any) -> Any:
    """A message as it was written; where rows differ in their keys, tables hold it as JSON."""
    try:
        return json.loads(message) if isinstance(message, str) else message
    except ValueError:
        return message


def _wrong(chat: list[Any]) -> str:
    for message in chat:
        if not isinstance(message, dict) or "role" not in message:
            return "a message has no `role` or no `content`"
        calls = message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(isinstance(_decoded(call), dict) for call in calls)):
            return "`tool_calls` of a message is no list of calls"
        if "content" not in message and not calls:
            return "a message has no `role` or no `content`"
        content = message.get("content") or ("" if calls else message["content"])
        if not isinstance(message["role"], str) or not isinstance(content, str):
            return "`role` and `content` of a message are texts"
        if message["role"] == ASSISTANT and not content.strip() and not calls:
            return "a turn of the assistant is empty"
    return "" if any(message["role"] == ASSISTANT for message in chat) else "the assistant says nothing"


def bad_tools(table: Table) -> Problem | None:
    """The problem of a column `tools` that isn't a list of functions, or a JSON text of one, in some row."""
    for index, tools in enumerate(table.columns.get("tools", ())):
        try:
            listed(tools.as_py())
        except ValueError as error:
            return Problem((*KEY, "tools"), f"{table.row(index)}: {error}", "write a list of functions' JSON schemas")
    return None


def listed(tools: Any) -> list[Any] | None:
    """The tools of a row, whether written as a list or as JSON text; raises `ValueError` for anything else."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"`tools` is no JSON ({error})") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("`tools` is no list of functions")
    return [_bare(tool) for tool in tools] if tools else None


def plain(chat: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as they were written: tables fill in what only other rows have, calls of other tools above all."""
    told = []
    for message in chat:
        kept = {key: _bare(value) for key, value in message.items() if value is not None and value != []}
        told.append({**kept, "content": kept.get("content", "")} if "tool_calls" in kept else kept)
    return told


def _bare(value: Any) -> Any:
    """A value without the keys that hold nothing, at any depth."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items() if inner is not None}
    return [_bare(inner) for inner in value] if isinstance(value, list) else value


def equip(processor: Any, named: str, root: Path) -> None:
    """Give a tokenizer the template that a recipe names: one of its own, or a file below `root`."""
    own = processor.chat_template if isinstance(processor.chat_template, dict) else {}
    processor.chat_template = own[named] if named in own else _read(named, own, root)


def _read(named: str, own: Mapping[str, str], root: Path) -> str:
    from jinja2 import Environment, TemplateError

    place = (root / named).resolve()
    if not place.is_relative_to(root.resolve()) or not place.is_file():
        has = f"; it has {', '.join(own)}" if own else ""
        what = f"`{named}` is no file below the data root, and no template that the tokenizer has by this name{has}"
        raise PlanError([Problem(TEMPLATE, what, "write the path of a file such as `chat.jinja`")])
    try:
        with place.open("rb") as file:
            written = file.read(LONGEST + 1)
        if len(written) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST:,} bytes")
        text = written.decode("utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(MARKS.sub("", text))
    except (OSError, ValueError, TemplateError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise PlanError([Problem(TEMPLATE, f"`{named}` is no chat template: {said}")]) from error
    return text


def all_tokens(
    chats: Sequence[Sequence[Message]], processor: Any, tools: Sequence[Tools] = ()
) -> Iterator[tuple[list[int], list[bool]]]:
    """`tokens` of each chat, in a process that a template can't keep busy or make large beyond measure."""
    both = list(zip(chats, tools or [None] * len(chats), strict=True))
    answers = confined(lambda one: _told(*one, processor), both)
    for chat in chats:
        try:
            said = next(answers)
        except ConfinedError as error:
            what = f"the model's chat template {error} for {_named(chat)}"
            raise PlanError([Problem(KEY, what, "look at the template, or take another model")]) from error
        if isinstance(said, dict):
            raise PlanError([Problem(tuple(said["key"]), said["what"], said["next"])])
        yield tuple(said)


def _told(chat: Sequence[Message], tools: Tools, processor: Any) -> Any:
    """The tokens of a chat, or what is wrong with it, as JSON can hold it."""
    try:
        return tokens(chat, processor, tools)
    except PlanError as error:
        (problem,) = error.problems
        return {"key": problem.key, "what": problem.what, "next": problem.next}


def tokens(messages: Sequence[Message], processor: Any, tools: Tools = None) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and of each whether the assistant wrote it, the token that ends its turn included.

    Raises `PlanError` where the template refuses the chat, or leaves open what the assistant wrote.
    """
    render = partial(_rendered, processor=processor, tools=tools)
    if MARKED.search(template(processor, bool(tools))):
        found = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], [bool(live) for live in found["assistant_masks"]]
    text = render(messages)
    encoded = processor(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    live = [False] * len(ids)
    for start, end in _spans(messages, text, render, _marks(processor)):
        inside = [at for at, (left, right) in enumerate(places) if right > start and left < end and left < right]
        for at in _until_the_end(inside, ids, places, text[:end], processor):
            live[at] = True
    return ids, live


def template(processor: Any, tools: bool = False) -> str:
    """The tokenizer's chat template: of several the one that is for `tools`, or by default; raises `PlanError`."""
    try:
        return processor.get_chat_template(tools=[{}] if tools else None)
    except ValueError as error:
        what = "the tokenizer of this model has no chat template, so a chat can't become one text"
        then = "take a model that was made for chats, or put a `chat_template.jinja` beside its tokenizer"
        raise PlanError([Problem(("model", "path"), what, then)]) from error


def _spans(
    messages: Sequence[Message], text: str, render: Callable[..., str], marks: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Where in the rendered text each turn of the assistant begins, after its header, and ends."""
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = render(messages[:index], add_generation_prompt=True)
        after = render(messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise _ambiguous(messages, "writes a turn otherwise where another follows")
        said, calls = after[len(before) :], "tool_calls" in message
        # a call is written in the template's own words, so what a header would hide is seen of plain words instead
        content = "said" if calls else message["content"].strip()
        shown = render([*messages[:index], {"role": ASSISTANT, "content": content}])[len(before) :] if calls else said
        if before == render(messages[:index]) and not shown.lstrip().startswith(content):
            raise _ambiguous(messages, "has no generation prompt, yet a header before the assistant's words")
        if not any(mark in said for mark in marks) if calls else said.rstrip().endswith(content):
            raise _ambiguous(messages, "writes nothing that ends the assistant's turn")
        yield len(before), len(after)


def _marks(processor: Any) -> list[str]:
    """The tokens that are no words, any of which may end a turn."""
    return [str(token) for token in processor.added_tokens_decoder.values() if token.special]


def _until_the_end(
    inside: list[int], ids: Sequence[int], places: Sequence[tuple[int, int]], text: str, processor: Any
) -> list[int]:
    """The tokens of a turn up to the one that ends it: a model that has written that stops, and no newline follows."""
    special = set(processor.all_special_ids) | set(processor.added_tokens_decoder)
    last = next((at for at in reversed(inside) if ids[at] in special), None)
    if last is None or text[places[last][1] :].strip():
        return inside
    return [at for at in inside if at <= last]


def _rendered(messages: Sequence[Message], *, processor: Any, tools: Tools, **how: Any) -> Any:
    from jinja2 import TemplateError

    how = {"tokenize": False, **how}
    try:
        return processor.apply_chat_template(list(messages), tools=list(tools) if tools else None, **how)
    except (TemplateError, TypeError) as error:
        what = f"the model's chat template refuses {_named(messages)}: {error}"
        raise PlanError([Problem(KEY, what, "change the row, or leave it out")]) from error


def _ambiguous(messages: Sequence[Message], why: str) -> PlanError:
    what = f"the model's chat template {why}, so what the assistant wrote in {_named(messages)} can't be told"
    return PlanError([Problem(KEY, what, "mark it in the template with `{% generation %}`, or cut chats to one turn")])


def _named(messages: Sequence[Message]) -> str:
    first = " ".join(str(messages[0].get("content") or "").split()) if messages else ""
    return f"the chat that begins with `{first[:60]}`"
