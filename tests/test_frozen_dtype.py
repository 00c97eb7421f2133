"""Frozen weights in 16 bits: what trains stays float32, a replay and the proof hold, plain transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from running import FROZEN, draft, events, place, run, stage
from safetensors import safe_open
from torch import nn

from engine import freezing, load, models, start
from engine.errors import ProblemsError
from engine.keeping import proof
from engine.keeping.folder import RunFolder
from engine.modelling import narrowing
from engine.records import Evaluated, Proved, StageStarted, Step
from engine.train import Loop

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

LORA = {"type": "lora", "r": 2, "target_modules": "query|value"}
BFLOAT16 = {"path": "model", "frozen_dtype": "bfloat16"}
IDS, MASK = torch.tensor([[2, 5, 7, 9, 11, 3], [2, 6, 3, 0, 0, 0]]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Types of the parameters as a run ends, and its answers to `IDS`."""
    seen: dict[str, Any] = {}
    save = RunFolder.save_model

    def watched(folder: RunFolder, learner: Any, proved: Any) -> Any:
        seen["types"] = {name: tensor.dtype for name, tensor in freezing.parameters(learner.model).items()}
        if "text" in learner.recipe.task.type:
            with freezing.eval_mode(learner.model):
                seen["logits"] = learner.model(input_ids=IDS, attention_mask=MASK).logits
        return save(folder, learner, proved)

    monkeypatch.setattr(RunFolder, "save_model", watched)
    return seen


def test_what_never_trains_has_two_bytes(tmp_path: Path, ended: dict[str, Any]) -> None:
    """Two stages, the second with an adapter: nearly the same losses with and without a replay."""
    root = place(tmp_path)
    stages = [
        stage("top", unfreeze="@blocks[-1]", epochs=1),
        stage("lora", freeze="@blocks[-1]", unfreeze="@blocks[-2]", adapters=[LORA], epochs=1),
    ]
    ran = {}
    for name, model, cache in (("off", BFLOAT16, "off"), ("auto", BFLOAT16, "auto")):
        happened = run(root, model=model, freeze=FROZEN, stages=stages, training={"logging_steps": 1}, cache=cache)
        ran[name] = [event.loss for event in events(happened, Step)], events(happened, Evaluated)[-1].metrics
        if name == "auto":
            assert all("replays" in event.frozen for event in events(happened, StageStarted))
            assert events(happened, Proved)[0].still > 40
            narrow, logits = ended["types"], ended["logits"]
            plain, said = transformers.AutoModelForSequenceClassification.from_pretrained(
                root / "runs/recipe/model", output_loading_info=True
            )
            assert not said["missing_keys"]
            assert not said["unexpected_keys"]
            assert {tensor.dtype for tensor in plain.parameters()} == {torch.float32}
            with torch.no_grad():
                again = plain.eval()(input_ids=IDS, attention_mask=MASK).logits
            assert torch.allclose(again, logits, atol=1e-2)
            assert not torch.equal(again, logits)
    assert torch.allclose(torch.tensor(ran["off"][0]), torch.tensor(ran["auto"][0]), rtol=1e-2)
    name, folder = "bert.embeddings.word_embeddings.weight", root / "runs/recipe/model"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    with (
        safe_open(folder / "model.safetensors", "pt") as file,
        safe_open(root / "model/model.safetensors", "pt") as was,
    ):
        assert torch.equal(file.get_tensor(name), was.get_tensor(name).bfloat16())
    # Adapters are merged into float32 weights, for two bytes would round away what they learned.
    merged = {
        f"bert.encoder.layer.2.attention.self.{part}.{kind}"
        for part in ("query", "value")
        for kind in ("weight", "bias")
    }
    two = {name for name, kind in narrow.items() if kind is torch.bfloat16}
    assert "bert.embeddings.word_embeddings.weight" in two
    assert (
        two
        == {
            name
            for name, kind in narrow.items()
            if ("embeddings" in name or "encoder.layer" in name) and "layer.3." not in name and "LayerNorm" not in name
        }
        - merged
    )
    assert all(kind is torch.float32 for name, kind in narrow.items() if name not in two)


@pytest.mark.slow
def test_a_run_that_was_cut_short_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, stages = place(tmp_path), [stage(unfreeze="@blocks[-1]", steps=6, adapters=[LORA])]
    keys: dict[str, Any] = {"model": BFLOAT16, "freeze": FROZEN, "stages": stages, "training": {"save_steps": 2}}
    run(root, **keys)
    saved = proof.saved_digests(root / "runs/recipe/model")
    publish, taken = Loop._publish, []

    def cut(loop: Loop) -> None:
        publish(loop)
        taken.append(loop.position.step)
        if len(taken) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_publish", cut)
        with pytest.raises(KeyboardInterrupt):
            run(root, **keys)
    loaded = load.load(root / "recipe.yaml")
    list(start.run(loaded, "recipe", root, root / "runs"))
    assert proof.saved_digests(root / "runs/recipe/model") == saved


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_adapters_learn_on_it_as_they_do_on_float32(tmp_path: Path, kind: str) -> None:
    """A Llama that learns to go on: the loss falls, and stays close to that of a run with float32 weights."""
    root = place(tmp_path, tiny.llama())
    tiny.byte_level().save_pretrained(root / "model")
    losses = []
    for model in ("model", {"path": "model", "frozen_dtype": kind}):
        happened = run(
            root,
            model=model,
            task="text-generation",
            freeze=[".*"],
            adapters=[{"type": "lora", "r": 4, "target_modules": [".*_proj"]}],
            stages=[stage(unfreeze="@blocks", steps=40)],
            training={"logging_steps": 5},
        )
        losses.append(torch.tensor([event.loss for event in events(happened, Step)]))
    assert losses[1][-1] < losses[1][0] - 0.1
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.02


KINDS: dict[str, Callable[..., nn.Module]] = {
    "bert": tiny.bert,
    "vit": tiny.vit,
    "resnet": tiny.resnet,
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "t5": tiny.t5,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_answers_nearly_the_same(kind: str) -> None:
    """All of it frozen but its norms, gradients pass through; what comes out is float32."""
    model, whole = KINDS[kind]().eval(), KINDS[kind]().eval()
    norms = {name for name, parameter in model.named_parameters() if "norm" in name.lower() or "ln_" in name}
    only = type("Plan", (), {"stages": (type("Stage", (), {"trainable": norms, "attaches": ()}),)})
    narrowing.narrow(model, models.Model(path="m", frozen_dtype="bfloat16"), only)  # pyright: ignore
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}
    assert model.dtype is torch.float32
    assert type(model).__name__ == type(whole).__name__
    inputs: dict[str, Any] = {"input_ids": IDS}
    if kind in ("vit", "resnet"):
        inputs = {"pixel_values": torch.rand(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(0))}
    if kind == "t5":
        inputs["decoder_input_ids"] = IDS
    found, exact = model(**inputs).logits, whole(**inputs).logits
    assert found.dtype is torch.float32
    assert 0 < (found - exact).abs().max() < 2e-2 * exact.abs().max().clamp(min=1)
    freezing.obey(model, norms)
    model(**inputs).logits.square().sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in freezing.trainable(model).values())  # pyright: ignore


def test_a_tied_weight_is_kept_whole_where_one_of_its_owners_trains(tmp_path: Path) -> None:
    """BERT's decoder holds the word embeddings and a bias: where that trains, neither has two bytes."""
    model = tiny.bert(kind="BertForMaskedLM")
    only = type("Plan", (), {"stages": (type("Stage", (), {"trainable": {"cls.predictions.bias"}, "attaches": ()}),)})
    narrowing.narrow(model, models.Model(path="m", frozen_dtype="bfloat16"), only)  # pyright: ignore
    types = {name: tensor.dtype for name, tensor in freezing.parameters(model).items()}
    assert types["bert.embeddings.word_embeddings.weight"] is torch.float32
    assert types["bert.embeddings.position_embeddings.weight"] is torch.bfloat16


def test_the_plan_knows_what_it_spares(tmp_path: Path) -> None:
    """To the byte what a run keeps; a stage to come counts as well."""
    root = place(tmp_path)
    stages = [
        stage("head", unfreeze="@head"),
        stage("top", unfreeze="@blocks[-1]"),
        stage("lora", unfreeze="@blocks[-2]", adapters=[LORA]),
    ]
    whole, narrow = (draft(root, model=model, freeze=FROZEN, stages=stages) for model in ("model", BFLOAT16))
    model = tiny.bert()
    narrowing.narrow(model, models.Model(**BFLOAT16), narrow.plan)
    spared = sum(2 * tensor.numel() for tensor in model.parameters() if tensor.dtype is torch.bfloat16)
    assert spared > 0
    for before, after in zip(whole.plan.stages, narrow.plan.stages, strict=True):
        assert before.forecast.memory.weights - after.forecast.memory.weights == spared


def test_what_can_not_be_is_one_sentence(tmp_path: Path) -> None:
    root = place(tmp_path)
    for more, words in (
        ({"model": BFLOAT16 | {"dtype": "float16"}}, "`dtype` says already how weights are kept"),
        (
            {"model": BFLOAT16 | {"quantization_config": {"quant_method": "torchao"}}},
            "`quantization_config` says already how weights are kept",
        ),
        ({"adapters": [{"type": "prefix_tuning", "num_virtual_tokens": 2}]}, "in the one type of all weights"),
    ):
        with pytest.raises(ProblemsError) as caught:
            draft(root, **{"model": BFLOAT16, "freeze": FROZEN, **more})
        (problem,) = caught.value.problems
        assert (problem.key, words in problem.sentence) == (("model", "frozen_dtype"), True), problem.sentence
