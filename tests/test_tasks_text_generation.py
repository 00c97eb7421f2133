"""What a language model is taught: which tokens have labels, how texts are packed, and what its metrics say."""

from __future__ import annotations

import re
from math import exp
from pathlib import Path
from typing import Any

import pytest
import running
import templates
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from running import stage

from engine.errors import PlanError
from engine.records import Evaluated, Proved, StageStarted
from engine.tasks import Facts, chats, packing
from engine.tasks.text_generation import TextGeneration
from engine.tasks.texts import IGNORED


def task(**keys: Any) -> TextGeneration:
    return TextGeneration.model_validate({"type": "text-generation", **keys})


def encoded(form: str, rows: dict[str, list[Any]], tokenizer: Any = None, **keys: Any) -> list[dict[str, Any]]:
    columns = task(**keys).encode(rows, tokenizer or tiny.byte_level(), Facts(form=form))
    columns.pop("truncated")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# Chats

CHATS = {
    "one turn": ["the film?", "good."],
    "two turns": ["the film?", "good,\nvery good", "the plot?\n\n", "a dull plot: no fun"],
    "edges": ["  spaces  ", "\n  good film ", "what", "not *very* good é"],
}


def chat(*texts: str, system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


@pytest.mark.parametrize("system", ["", "be kind"])
@pytest.mark.parametrize("texts", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("family", templates.MARKED)
def test_the_assistants_tokens_are_those_its_template_marks(family: str, texts: list[str], system: str) -> None:
    template, special = templates.MARKED[family]
    if system and family in ("mistral", "gemma"):
        pytest.skip("has no system turn")
    messages = chat(*texts, system=system)
    marking, plain = tiny.byte_level(template, special), tiny.byte_level(templates.unmarked(template), special)
    wanted = marking.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, live = chats.tokens(messages, plain)
    assert ids == wanted["input_ids"]
    assert live == [bool(flag) for flag in wanted["assistant_masks"]]
    assert chats.tokens(messages, marking) == (ids, live)
    answers = plain.decode([token for token, alive in zip(ids, live, strict=True) if alive])
    end = special[-2] if family == "gemma" else special[-1]
    assert answers.count(end) == len(texts) // 2
    assert answers.endswith(end)


THINKING = (
    "{% for t in messages %}{{ t.role + ':' }}{% if loop.last and t.role != 'user' %}{{ '<think>' }}{% endif %}"
    "{{ t.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Thoughts are kept for the last answer alone."""
AMBIGUOUS = {
    "has no generation prompt": "{% for t in messages %}{{ '<s>' + t.role + '\n' + t.content + '</s>\n' }}{% endfor %}",
    "writes nothing that ends": "{% for t in messages %}{{ t.role + ': ' + t.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "where another follows": THINKING,
    "refuses the chat that begins with `the film?`": "{{ raise_exception('never') }}",
}


@pytest.mark.parametrize("said", AMBIGUOUS)
def test_a_template_that_leaves_it_open_is_refused(said: str) -> None:
    with pytest.raises(PlanError, match=re.escape(said)):
        chats.tokens(chat("the film?", "good", "the plot?", "dull"), tiny.byte_level(AMBIGUOUS[said]))


def test_a_template_that_rewrites_earlier_turns_serves_chats_of_one() -> None:
    tokenizer = tiny.byte_level(THINKING)
    ids, live = chats.tokens(chat("the film?", "good"), tokenizer)
    assert tokenizer.decode([i for i, alive in zip(ids, live, strict=True) if alive]) == "<think>good</s>"


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(PlanError, match="has no chat template"):
        chats.tokens(chat("a", "b"), tiny.byte_level())


def test_chats_are_labelled_and_cut() -> None:
    template, special = templates.MARKED["zephyr"]
    tokenizer = tiny.byte_level(templates.unmarked(template), special)
    rows = {"messages": [chat("the film?", "good"), chat("the film?", "good " * 40)]}
    columns = task(max_length=16).encode(rows, tokenizer, Facts(form="chat"))
    assert columns["truncated"] == [True, True]
    whole = encoded("chat", rows, tokenizer)[0]
    live = [label for label in whole["labels"] if label != IGNORED]
    assert tokenizer.decode(live) == "good</s>"
    assert [len(ids) for ids in columns["input_ids"]] == [16, 16]


# Prompts and completions


def test_only_the_completion_has_labels() -> None:
    tokenizer = tiny.byte_level()
    (example,) = encoded("completion", {"prompt": ["the film is"], "completion": [" very good"]}, tokenizer)
    live = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(live) == " very good</s>"
    assert example["input_ids"] == [*tokenizer("the film is very good")["input_ids"], tokenizer.eos_token_id]
    assert len(example["labels"]) == len(example["input_ids"])


def test_no_token_lies_across_the_border() -> None:
    """Both as one text would make `film` one token; the model is given the prompt alone, and that ends in `fi`."""
    tokenizer = tiny.byte_level()
    assert len(tokenizer("the film")["input_ids"]) == 2
    (example,) = encoded("completion", {"prompt": ["the fi"], "completion": ["lm"]}, tokenizer)
    prompt = tokenizer("the fi")["input_ids"]
    assert example["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode([label for label in example["labels"] if label != IGNORED]) == "lm</s>"


def test_a_tokenizer_that_never_ends_is_refused() -> None:
    with pytest.raises(PlanError, match="no token that ends a text"):
        encoded("completion", {"prompt": ["the"], "completion": ["film"]}, tiny.tokenizer())


# Plain texts and packing


@given(st.integers(0, 60), st.integers(8, 20))
def test_windows_predict_every_token_once(length: int, most: int) -> None:
    pieces = packing.windows(list(range(length)), most)
    assert all(len(piece) <= most for piece in pieces)
    assert [token for piece in pieces for token in piece[1:]] == list(range(1, length))


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_packs_hold_every_piece_once_and_little_room(lengths: list[int]) -> None:
    groups = packing.pack(lengths, 16)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in group) for group in groups]
    assert max(sums) <= 16
    assert sum(sorted(sums)[:2]) > 16 or len(groups) < 2, "two groups would have fitted into one"


TEXTS = ["the film is good", "a dull plot, and a very very dull cast", "fun", "no", "great " * 30]


def losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """The summed loss of a batch, and the number of its live tokens."""
    weight = task().weight(batch)
    with torch.no_grad():
        return float(task().forward(model, batch).loss) * weight, weight


@pytest.mark.parametrize("build", [tiny.llama, lambda: tiny.gpt2(vocab_size=320, n_positions=64)])
def test_packed_texts_do_not_see_each_other(build: Any) -> None:
    model, tokenizer = build().eval(), tiny.byte_level()
    alone = encoded("text", {"text": TEXTS}, tokenizer, max_length=24)
    packed = encoded("text", {"text": TEXTS}, tokenizer, max_length=24, packing=True)
    assert len(packed) < len(alone)
    collate = task(max_length=24).collate(tokenizer)
    wanted = [losses(model, collate([example])) for example in alone]
    found = losses(model, collate(packed))
    assert found[1] == sum(weight for _, weight in wanted)
    assert found[0] == pytest.approx(sum(loss for loss, _ in wanted), rel=1e-5)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("mistral", {"intermediate_size": 32, "num_key_value_heads": 2}, None),
        ("gpt_neox", {"intermediate_size": 32}, None),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 0}, "lets packed texts see each other"),
        ("falcon", {}, "lets packed texts see each other"),
        ("bloom", {"n_head": 2}, "takes no `position_ids`"),
    ],
)
def test_a_model_that_leaks_is_refused(kind: str, sizes: dict[str, Any], said: str | None) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if said is None:
        return task(packing=True).trim(model)
    with pytest.raises(PlanError, match=said):
        task(packing=True).trim(model)
    return task().trim(model)


def test_padding_has_no_labels_though_it_ends_texts() -> None:
    tokenizer = tiny.byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    batch = task().collate(tokenizer)(encoded("text", {"text": TEXTS[:3]}, tokenizer))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert ((batch["labels"] == IGNORED) == (batch["attention_mask"] == 0)).all()
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 3


# Rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"title": "a"}, "no columns look like `text`, `prompt` and `completion`, or `messages`"),
        ({"prompt": "a"}, "no columns look like `text`"),
        ({"text": ""}, "train.jsonl, row 1: `text` is empty"),
        ({"messages": [{"from": "human", "value": "a"}]}, "row 1: a message has no `role` or no `content`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 1: the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "row 1: a turn of the assistant is empty"),
        ({"messages": "a"}, "`messages` holds string values, not lists of messages"),
    ],
)
def test_rows_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    running.place(tmp_path, tiny.llama(), [row] * 4, [row])
    with pytest.raises(PlanError) as caught:
        running.draft(tmp_path, task="text-generation")
    assert said in str(caught.value)


# Runs


def sentences(count: int) -> list[dict[str, str]]:
    """Texts that follow a rule, which a tiny model learns: what the film is, the plot is too."""
    kinds = ["good", "bad", "dull", "great", "fun"]
    return [
        {"text": f"the film is {k}, the plot is {k}" + ", very" * (i % 4)} for i in range(count) for k in [kinds[i % 5]]
    ]


def place(root: Path, train: Any = None, validation: Any = None, template: str | None = None) -> Path:
    model, tokenizer = tiny.llama(initializer_range=0.2), tiny.byte_level(template)
    running.place(root, model, train or sentences(48), validation or sentences(16))
    tokenizer.save_pretrained(root / "model")
    return root


def test_perplexity_is_the_exponential_of_the_loss(tmp_path: Path) -> None:
    happened = running.run(place(tmp_path), task="text-generation", evaluation={"batch_size": 3})
    (judged,) = [event.metrics for event in running.events(happened, Evaluated)]
    assert judged["perplexity"] == pytest.approx(exp(judged["loss"]), rel=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/recipe/model")
    assert model.config.use_cache, "what is saved is there to write"
    examples = encoded("text", {"text": [row["text"] for row in sentences(16)]})
    found = [losses(model, task().collate(tiny.byte_level())([example])) for example in examples]
    assert judged["loss"] == pytest.approx(sum(a for a, _ in found) / sum(b for _, b in found), rel=1e-5)


def test_it_learns_and_packing_loses_nothing(tmp_path: Path) -> None:
    for packed in (False, True):
        root = tmp_path / str(packed)
        kind = {"type": "text-generation", "packing": packed, "max_length": 64}
        happened = running.run(place(root), task=kind, stages=[stage(steps=40)], evaluation={"eval_steps": 20})
        judged = [event.metrics for event in running.events(happened, Evaluated)]
        assert judged[-1]["perplexity"] < 3 < 30 < exp(5.0)
        assert judged[-1]["token_accuracy"] > 0.7


LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_of_the_top_layers_through_a_staged_run_with_a_cache(tmp_path: Path, packed: bool) -> None:
    """Adapters on the top half, merged; then the weights of the last block; what is replayed changes nothing."""
    stages = [
        stage("lora", unfreeze="@blocks[-2:]", epochs=3, then="merge"),
        stage("last", freeze="@blocks", unfreeze="@blocks[-1]", epochs=3),
    ]
    keys = {"task": {"type": "text-generation", "packing": packed}, "freeze": ".*", "adapters": [LORA]}
    results = []
    for cache in ("off", "auto"):
        root = place(tmp_path / cache)
        happened = running.run(root, **keys, stages=stages, cache=cache, per_device_batch_size=3)
        said = [event.frozen for event in running.events(happened, StageStarted)]
        assert all(("replays" in text) is (cache == "auto") for text in said), said
        (proved,) = running.events(happened, Proved)
        assert not proved.unmoved
        results.append([event.metrics for event in running.events(happened, Evaluated)])
        assert results[-1][-1]["loss"] < results[-1][0]["loss"]
    assert [r["loss"] for r in results[0]] == pytest.approx([r["loss"] for r in results[1]], rel=1e-5)
    names = {
        name
        for name, _ in transformers.AutoModelForCausalLM.from_pretrained(root / "runs/recipe/model").named_parameters()
    }
    assert not [name for name in names if "lora" in name]


def test_chats_train_from_a_recipe(tmp_path: Path) -> None:
    template = templates.unmarked(templates.ZEPHYR)
    rows = [{"messages": chat(row["text"], row["text"])} for row in sentences(32)]
    root = place(tmp_path, rows[:24], rows[24:], template)
    happened = running.run(
        root, task="text-generation", stages=[stage(steps=30)], training={"label_smoothing_factor": 0.05}
    )
    assert running.events(happened, Evaluated)[-1].metrics["token_accuracy"] > 0.5
