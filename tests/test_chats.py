"""Chats that call tools, and chat templates that a recipe brings: what the assistant wrote is learnt token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import templates
import tiny
import transformers
from running import events, place, refused, run, stage

from engine.errors import PlanError
from engine.records import Evaluated
from engine.tasks import Facts, chats
from engine.tasks.text_generation import TextGeneration
from engine.tasks.texts import IGNORED

TOOLS = [
    {"type": "function", "function": {"name": "rate", "parameters": {"type": "object", "properties": {"film": {}}}}},
    {"type": "function", "function": {"name": "cast", "parameters": {"type": "object", "properties": {"of": {}}}}},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLS = {
    "one call": [
        said("user", "is it good?"), said("assistant", None, tool_calls=[call("rate", film="dull plot")]),
        said("tool", '{"stars": 2}'), said("assistant", "not very good"),
    ],
    "a call at the end": [said("user", "the cast?"), said("assistant", "", tool_calls=[call("cast", of=["a", "b"])])],
    "answers before and after": [
        said("user", "a film?"), said("assistant", "the film is fun"), said("user", "its cast?"),
        said("assistant", "", tool_calls=[call("cast", of=["fun"])]), said("tool", "no cast"), said("assistant", "no"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("family", templates.CALLING)
def test_the_assistants_tokens_are_those_its_template_marks(family: str, name: str, tools: Any) -> None:
    template, special = templates.CALLING[family]
    messages = chats.plain(CALLS[name])
    marking, bare = tiny.byte_level(template, special), tiny.byte_level(templates.unmarked(template), special)
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    wanted = marking.apply_chat_template(messages, tools=tools, **how)
    ids, live = chats.tokens(messages, bare, tools)
    assert ids == wanted["input_ids"]
    assert live == [bool(flag) for flag in wanted["assistant_masks"]]
    assert chats.tokens(messages, marking, tools) == (ids, live)
    learnt = bare.decode([token for token, alive in zip(ids, live, strict=True) if alive])
    assert learnt.count(special[-1]) == sum(message["role"] == "assistant" for message in messages)
    assert ('"properties"' in bare.decode(ids)) is bool(tools)
    assert '"properties"' not in learnt


OPEN = {
    "has no generation prompt": "{% for t in messages %}{{ '<s>' + t.role + '\n' }}{% if t.tool_calls %}"
    "{{ t.tool_calls | tojson }}{% else %}{{ t.content }}{% endif %}{{ '</s>\n' }}{% endfor %}",
    "writes nothing that ends": "{% for t in messages %}{{ t.role + ': ' + (t | tojson) + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}


@pytest.mark.parametrize("words", OPEN)
def test_a_template_that_leaves_open_what_a_call_is_is_refused(words: str) -> None:
    with pytest.raises(PlanError, match=words):
        chats.tokens(chats.plain(CALLS["a call at the end"]), tiny.byte_level(OPEN[words]))


def test_tables_fill_in_nothing_that_a_template_would_see() -> None:
    """In one column of a table every call has every argument that any call has; they are gone again."""
    rows = datasets.Dataset.from_list([{"messages": chat, "tools": TOOLS} for chat in CALLS.values()])
    assert rows["messages"][0][0]["tool_calls"] is None
    assert rows["messages"][0][1]["tool_calls"][0]["function"]["arguments"]["of"] is None
    assert [chats.plain(chat) for chat in rows["messages"]] == [chats.plain(chat) for chat in CALLS.values()]
    assert chats.listed(rows["tools"][0]) == TOOLS
    assert chats.listed(json.dumps(TOOLS)) == TOOLS


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (said("assistant", None), "texts"),
        (said("assistant", " ", tool_calls=[]), "a turn of the assistant is empty"),
        (said("assistant", "", tool_calls="rate()"), "no list of calls"),
    ],
)
def test_calls_that_are_none_are_refused(message: dict[str, Any], words: str) -> None:
    assert words in chats._wrong([said("user", "a film?"), message])


@pytest.mark.parametrize("tools", ['{"name": "rate"}', "[rate", "[1]"])
def test_tools_that_are_none_are_refused(tools: str) -> None:
    with pytest.raises(ValueError, match="`tools` is no"):
        chats.listed(tools)


# Templates that a recipe brings


def folder(root: Path, template: str | None = None) -> Path:
    rows = [{"messages": CALLS[name], "tools": json.dumps(TOOLS)} for name in CALLS] * 6
    place(root, tiny.llama(max_position_embeddings=512), rows[:12], rows[12:])
    tokenizer = tiny.byte_level(template, templates.CALLING["qwen"][1])
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(root / "model")
    return root


def asked(named: str) -> dict[str, Any]:
    return {"type": "text-generation", "chat_template": named, "max_length": 512}


@pytest.mark.slow
def test_a_file_below_the_data_root_is_used_and_saved(tmp_path: Path) -> None:
    root = folder(tmp_path)
    written = templates.unmarked(templates.QWEN_TOOLS)
    (root / "chat.jinja").write_text(written)
    happened = run(root, task=asked("chat.jinja"), stages=[stage(steps=4)])
    assert events(happened, Evaluated)
    assert transformers.AutoTokenizer.from_pretrained(root / "runs/recipe/model").chat_template == written


def test_one_of_the_tokenizers_own_is_taken_by_its_name(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = {"default": templates.CHATML, "short": templates.MISTRAL}
    task = TextGeneration.model_validate({**asked("short"), "max_length": 64})
    task.equip(tokenizer, tmp_path)
    assert tokenizer.chat_template == templates.MISTRAL
    rows = {"messages": [[said("user", "a film?"), said("assistant", "good")]]}
    (labels,) = task.encode(rows, tokenizer, Facts(form="chat"))["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "good</s>"


BAD = {
    "no file below the data root": ("other.jinja", None),
    "no file below the data root, and": ("../outside.jinja", "{{ 1 }}"),
    "is no chat template: unexpected": ("chat.jinja", "{{ messages[0 }}"),
    "is longer than 262,144 bytes": ("chat.jinja", "{# a #}" * 50_000),
    "can't decode byte": ("chat.jinja", b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("words", BAD)
def test_templates_that_are_none_are_refused(tmp_path: Path, words: str) -> None:
    named, written = BAD[words]
    root = folder(tmp_path / "root")
    if written is not None:
        (root / named).write_bytes(written if isinstance(written, bytes) else written.encode())
    key, sentence = refused(root, task=asked(named))
    assert key == ("task", "chat_template")
    assert words in sentence


def test_a_template_without_chats_is_refused(tmp_path: Path) -> None:
    root = place(tmp_path, tiny.llama())
    key, sentence = refused(root, task=asked("chat.jinja"))
    assert key == ("task", "chat_template")
    assert "the data hold text rows" in sentence
