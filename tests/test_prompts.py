"""Virtual tokens through a whole run: the model keeps its names and its bits, and plain PEFT reads what was learned."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import datasets
import pytest
import staged
import tiny
import torch
import transformers
from peft import get_peft_model
from running import FROZEN, draft, events, place, run, stage
from safetensors.torch import load_file
from torch import nn

from engine import adapters, freezing, prompts
from engine.errors import ProblemsError, RunError
from engine.export import export
from engine.load import load
from engine.planning import thrift
from engine.records import Note, Proved, StageStarted, Step
from engine.shipping import apart

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "cartridge": {"num_virtual_tokens": 4},
}
IDS = "[[2, 5, 7, 9, 11, 3], [2, 6, 3, 0, 0, 0]]"
MASK = "[[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def put_together(root: Path, clean: bool = True) -> torch.Tensor:
    """The logits that the README's own code gives, in a clean process or in this one."""
    made = root / "runs/recipe"
    code = re.search(r"```python\n(.*?)```", (made / "adapter/README.md").read_text(), re.DOTALL)
    assert code
    script = f"""
import torch, transformers
transformers.utils.logging.disable_progress_bar()
{code[1].replace("'model'", repr(str(root / "model")))}
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS}), attention_mask=torch.tensor({MASK})).logits
print("logits", logits.double().tolist())
"""
    if not clean:
        names: dict[str, Any] = {}
        with contextlib.chdir(made), contextlib.redirect_stdout(None), catch_warnings(action="ignore"):
            exec(script, names)
        return names["logits"].double()
    done = subprocess.run([sys.executable, "-c", script], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.split("logits")[1]), dtype=torch.double)


def kinds(quick: str) -> list[Any]:
    """One kind in this process, and all of them in a clean one, which takes seconds to import what it needs."""
    slow = [pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS]
    return [(quick, False), *slow] if quick else slow


def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the model of a run answers at the moment when its adapters are saved."""
    answers: list[torch.Tensor] = []
    write = apart.write

    def watched(learner: Any, own: Any, folder: Path) -> None:
        with freezing.eval_mode(learner.model):
            ids, mask = torch.tensor(json.loads(IDS)), torch.tensor(json.loads(MASK))
            answers.append(learner.model(input_ids=ids, attention_mask=mask).logits.double())
        write(learner, own, folder)

    monkeypatch.setattr(apart, "write", watched)
    return answers


def proved_alone(root: Path, happened: Any, head: set[str]) -> None:
    """The loss fell, nothing but the prompt and the head moved, and the base model is as it was to the bit."""
    losses = [event.loss for event in events(happened, Step)]
    assert losses[-1] < losses[0]
    before, after = (load_file(root / f"{name}/model.safetensors") for name in ("model", "runs/recipe/model"))
    assert before.keys() == after.keys()
    assert {name for name, tensor in before.items() if not torch.equal(tensor, after[name])} == head
    assert events(happened, Proved)[0].still >= len(before) - len(head)
    assert any("can't be merged" in note.sentence for note in events(happened, Note))


@pytest.mark.parametrize(("kind", "clean"), kinds("prefix_tuning"))
def test_it_trains_a_bert(tmp_path: Path, kind: str, clean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root, answers = place(tmp_path), asked(monkeypatch)
    prompt = {"type": kind, **KINDS[kind]}
    keys = {"freeze": [*FROZEN, "pooler"], "adapters": [prompt], "training": {"logging_steps": 4}, "cache": "auto"}
    happened = run(root, stages=[stage("prompted", steps=20, learning_rate=5e-2)], **keys)
    proved_alone(root, happened, {"classifier.weight", "classifier.bias"})
    assert "they change every layer" in events(happened, StageStarted)[0].frozen
    assert float((put_together(root, clean) - answers[0]).abs().max()) <= 1e-6


@pytest.mark.parametrize(("kind", "clean"), kinds(""))
def test_it_trains_a_llama(tmp_path: Path, kind: str, clean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root, answers = place(tmp_path, tiny.llama()), asked(monkeypatch)
    tiny.byte_level().save_pretrained(root / "model")
    prompt = {"type": kind, **KINDS[kind]}
    task, freeze = {"type": "text-generation", "max_length": 24}, ["@embeddings", "@blocks", "@head", "model.norm"]
    stages, training = [stage("prompted", steps=20, learning_rate=5e-2)], {"logging_steps": 4}
    happened = run(root, task=task, freeze=freeze, adapters=[prompt], stages=stages, training=training)
    proved_alone(root, happened, set())
    plain = put_together(root, clean)[:, -6:]  # PEFT's own has those of the virtual tokens, too
    assert float((plain - answers[0]).abs().max()) <= 1e-5


MODELS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "bert": ("AutoModelForSequenceClassification", tiny.bert, tuple(KINDS)),
    "tags": ("AutoModelForTokenClassification", lambda: tiny.bert(kind="BertForTokenClassification"), prompts.KEYS),
    "answers": ("AutoModelForQuestionAnswering", lambda: tiny.bert(kind="BertForQuestionAnswering"), prompts.KEYS),
    "vectors": ("AutoModel", lambda: tiny.bert(kind="BertModel"), prompts.KEYS),
    "gpt2": ("AutoModelForCausalLM", tiny.gpt2, tuple(KINDS)),
    "llama": ("AutoModelForCausalLM", tiny.llama, tuple(KINDS)),
    "t5": ("AutoModelForSeq2SeqLM", tiny.t5, tuple(KINDS)),
}
"""Class of models, one of them, and the kinds that it can have."""


def prompted(kind: str, auto: str, model: nn.Module) -> Any:
    torch.manual_seed(7)
    adapters.attach(model, "own", adapters.config(kind, {**KINDS[kind], "task_type": prompts.TASKS[kind][auto]}, []))
    return model.eval()


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, _, able) in MODELS.items() for kind in able])
def test_the_model_answers_as_peft_does(name: str, kind: str) -> None:
    """Forward passes and texts are those of a `PeftModel`, names are the bare model's, all of it comes off again."""
    auto, make, _ = MODELS[name]
    bare, ours = make().eval(), prompted(kind, auto, make())
    torch.manual_seed(7)
    config = adapters.config(kind, {**KINDS[kind], "task_type": prompts.TASKS[kind][auto]}, [])
    with catch_warnings(action="ignore"):
        theirs = get_peft_model(make(), config, adapter_name="own").eval()
    ids, mask = torch.tensor(json.loads(IDS)), torch.tensor(json.loads(MASK))
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        batch["labels"] = ids
    with torch.no_grad():
        one, other, plain = (model(**batch)[0 if name != "t5" else "logits"] for model in (ours, theirs, bare))
        assert torch.equal(one, other[:, -one.shape[1] :])
        assert one.shape == plain.shape
        assert not torch.allclose(one, plain, atol=1e-3)
        if hasattr(bare, "generate") and name in ("gpt2", "llama", "t5"):
            asked = {"input_ids": ids[:1], "attention_mask": mask[:1], "max_new_tokens": 5, "do_sample": False}
            written = ours.generate(**asked)
            with catch_warnings(action="ignore"):
                assert torch.equal(written, theirs.generate(**asked))
    own = {name for name in freezing.parameters(ours) if not name.startswith("virtual_tokens.own.")}
    assert own == set(freezing.parameters(bare))
    adapters.detach(ours, "drop")
    assert type(ours) is type(bare)
    assert set(freezing.parameters(ours)) == set(freezing.parameters(bare))
    with torch.no_grad():
        assert torch.equal(ours(**batch)[0], bare(**batch)[0])


def test_the_first_token_of_a_text_counts_nowhere() -> None:
    model = prompted("prompt_tuning", "AutoModelForCausalLM", tiny.llama())
    ids = torch.tensor([[2, 5, 7, 9]])
    first, other = ids.clone(), ids.clone()
    first[0, 0] = -100
    losses = [model(input_ids=ids, labels=labels).loss.item() for labels in (ids, first)]
    assert losses[0] == losses[1]
    assert torch.equal(ids, other), "the batch itself is left as it was"


@pytest.mark.slow
def test_a_text_to_start_from(tmp_path: Path) -> None:
    root = place(tmp_path)
    prompt = {"type": "prompt_tuning", "num_virtual_tokens": 3, "prompt_tuning_init": "TEXT"}
    prompt["prompt_tuning_init_text"] = "the film is good"
    run(root, freeze=FROZEN, adapters=[prompt], stages=[stage(learning_rate=1e-9)])
    words = load_file(root / "model/model.safetensors")["bert.embeddings.word_embeddings.weight"]
    started = load_file(root / "runs/recipe/adapter/adapter_model.safetensors")["prompt_embeddings"]
    text = tiny.tokenizer()("the film is good")["input_ids"][:3]
    assert torch.allclose(started, words[text], atol=1e-6)
    kept = json.loads((root / "runs/recipe/adapter/adapter_config.json").read_text())
    assert str(root) not in json.dumps({**kept, "base_model_name_or_path": ""})


def told(root: Path, **keys: Any) -> tuple[tuple[str | int, ...], str]:
    """Key and sentence of the one problem for which a draft is refused."""
    with pytest.raises(ProblemsError) as caught:
        draft(root, **keys)
    (problem,) = caught.value.problems
    assert "\n" not in problem.sentence
    return problem.key, problem.sentence


def test_what_can_not_be_is_one_sentence(tmp_path: Path) -> None:
    root = place(tmp_path)
    prompt = {"type": "prompt_tuning", "num_virtual_tokens": 4}
    key, said = told(root, freeze=FROZEN, adapters=[prompt], stages=[stage(then="merge")])
    assert (key, "can't be merged into weights, as stage `all` asks for" in said) == (("adapters", 0), True)
    for more, words in (
        ({"target_modules": "query"}, "goes to no module"),
        ({"num_virtual_tokens": 0}, "wants a whole number `num_virtual_tokens`"),
        ({"type": "p_tuning"}, "wants a whole number `encoder_hidden_size`"),
        ({"tokenizer_name_or_path": "elsewhere"}, "the model's own tokenizer"),
        ({"colour": 1}, "is no field of PEFT's PromptTuningConfig"),
    ):
        key, said = told(root, freeze=FROZEN, adapters=[prompt | more], stages=[stage()])
        assert (key, words in said) == (("adapters", 0), True), said
    key, said = told(root, freeze=FROZEN, adapters=[prompt, {**prompt, "type": "prefix_tuning"}], stages=[stage()])
    assert (key, "one prompt at a time" in said) == (("adapters", 1), True)
    prefix = [{"type": "prefix_tuning", "num_virtual_tokens": 4}]
    _, said = told(root, freeze=FROZEN, adapters=prefix, stages=[stage()], training={"activation_checkpointing": True})
    assert "asks for them again" in said
    tags = {"model": "model", "auto": "AutoModelForTokenClassification"}
    said = prompts.refusal("p_tuning", prompt, tags["auto"], aims=False, packed=False, recomputed=False)
    assert "has no way to lead AutoModelForTokenClassification" in said
    assert "several in a row" in prompts.refusal(
        "prompt_tuning", prompt, "AutoModelForCausalLM", aims=False, packed=True, recomputed=False
    )


def test_what_reads_the_last_token_of_a_row_is_told(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=tiny.VOCABULARY, pad_token_id=0)
    root = place(tmp_path, transformers.GPT2ForSequenceClassification(config))
    prompt = {"type": "prompt_tuning", "num_virtual_tokens": 4}
    _, said = told(root, freeze=FROZEN, adapters=[prompt], stages=[stage()])
    assert "take `prefix_tuning`" in said


def test_the_plan_says_that_nothing_lies_below(tmp_path: Path) -> None:
    prompt = {"type": "prompt_tuning", "num_virtual_tokens": 4}
    stages = [
        stage("head", epochs=2),
        stage("prompted", epochs=2, adapters=[prompt], learning_rate={"@embeddings": 0.1}),
    ]
    drafted = draft(place(tmp_path), freeze=FROZEN, stages=stages)
    head, later = drafted.plan.stages
    assert (head.below > 0.5, later.below) == (True, 0.0)
    assert later.adapters == 4 * 16
    assert {group.learning_rate for group in later.groups if "virtual_tokens" in group.parameters[0]} == {0.1}
    assert later.forecast.step_flops > 2 * head.forecast.step_flops
    notes = thrift.notes(load(tmp_path / "recipe.yaml").recipe, drafted.plan, drafted.outline)
    assert any("`prompt_tuning` change every layer, so nothing lies below the frost line" in note for note in notes)


@pytest.mark.slow
def test_dropped_it_makes_room_and_frozen_weights_stay(tmp_path: Path) -> None:
    """A prompt, then weights beside a LoRA and another prompt, whose parts are put together again by plain PEFT."""
    root = place(tmp_path)
    lora = {"type": "lora", "r": 2, "target_modules": "query"}
    kinds = [{"type": kind, **KINDS[kind]} for kind in ("prompt_tuning", "prefix_tuning")]
    stages = [
        stage("first", adapters=kinds[:1], then="drop"),
        stage("second", unfreeze="@blocks[-2:]", adapters=[*kinds[1:], lora]),
    ]
    happened = run(root, freeze=FROZEN, stages=stages)
    assert events(happened, Proved)
    held = root / "runs/recipe/adapter"
    assert sorted(path.name for path in held.iterdir() if path.is_dir()) == ["lora", "prefix_tuning"]
    with pytest.raises(RunError, match="virtual tokens can't be merged"):
        export(root / "runs/recipe", "onnx", root=root)
    export(root / "runs/recipe", "adapter", root=root)


@pytest.mark.slow
def test_lora_beside_it_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, answers = place(tmp_path), asked(monkeypatch)
    kinds = [{"type": "prompt_tuning", **KINDS["prompt_tuning"]}, {"type": "lora", "r": 2, "target_modules": "query"}]
    run(root, freeze=FROZEN, stages=[stage(unfreeze="@blocks[-2:]", adapters=kinds, steps=8)])
    assert float((put_together(root) - answers[0]).abs().max()) <= 1e-6


@pytest.mark.slow
def test_cut_off_in_each_stage_it_comes_to_the_same(tmp_path: Path) -> None:
    kinds = [{"type": kind, **KINDS[kind]} for kind in ("p_tuning", "prefix_tuning")]
    stages = [
        {"name": "head", "steps": 3},
        {"name": "first", "adapters": kinds[:1], "steps": 3, "then": "drop"},
        {"name": "second", "unfreeze": "@blocks[-1:]", "adapters": kinds[1:], "steps": 3},
    ]
    training = {**staged.RECIPE["training"], "save_steps": 1}
    keys = {"freeze": FROZEN, "stages": stages, "training": training}
    whole, cut = (staged.place(tmp_path / name, **keys) for name in ("one", "two"))
    assert staged.run(whole) == [0], staged.said(whole)
    code, cuts = -1, 0
    while code:
        (code,) = staged.run(cut, plant=staged.signal_at(3, staged.signal.SIGKILL))
        cuts += code != 0
        assert cuts < 15, staged.said(cut)
    assert cuts >= 3
    assert staged.equal(staged.weights(whole), staged.weights(cut))
    for name in ("adapter_model", "weights"):
        one, other = (load_file(staged.folder(root) / f"adapter/{name}.safetensors") for root in (whole, cut))
        assert staged.equal(one, other)
    assert staged.history(whole) == staged.history(cut)
