"""Frozen weights in 8 or 4 bits: what thaws stays as it is, replay and proof hold, plain PEFT reads what was learned.

The runs are for where bitsandbytes or torchao is installed; everything else holds without them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from running import FROZEN, draft, events, place, run, stage

from engine import freezing
from engine.errors import ProblemsError, RunError
from engine.export import export
from engine.modelling import quantizing
from engine.recipe import Model
from engine.records import Note, Proved, StageStarted, Step
from engine.shipping import apart

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
]

WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
}
LORA = {"type": "lora", "r": 2, "target_modules": "query|value"}
IDS, MASK = torch.tensor([[2, 5, 7, 9, 11, 3], [2, 6, 3, 0, 0, 0]]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def ways() -> list[Any]:
    return [
        pytest.param(way, id=name, marks=pytest.mark.skipif(find_spec(way["quant_method"]) is None, reason="not here"))
        for name, way in WAYS.items()
    ]


def wide(root: Path) -> Path:
    return place(root, tiny.bert(hidden_size=64, intermediate_size=128))


@pytest.mark.parametrize("way", ways())
def test_only_what_never_trains_is_quantised(tmp_path: Path, way: dict[str, Any], monkeypatch: Any) -> None:
    """The same losses with and without a replay; the frozen weights are few bits, and those that thaw are float32."""
    root, kinds = wide(tmp_path), {}
    write = apart.write

    def watched(learner: Any, own: Any, folder: Path) -> None:
        kinds.update({name: tensor.dtype for name, tensor in freezing.parameters(learner.model).items()})
        kinds["packed"] = set(quantizing.packed(learner.model))
        write(learner, own, folder)

    monkeypatch.setattr(apart, "write", watched)
    losses = []
    for cache in ("off", "auto"):
        happened = run(
            root,
            model={"path": "model", "quantization_config": way},
            freeze=FROZEN,
            stages=[
                stage("top", unfreeze="@blocks[-1]", epochs=2),
                stage("lora", freeze="@blocks[-1]", unfreeze="@blocks[-2]", adapters=[LORA], epochs=2),
            ],
            training={"logging_steps": 3},
            cache=cache,
        )
        losses.append([event.loss for event in events(happened, Step)])
        assert events(happened, Proved)[0].still > 50
    assert losses[0] == losses[1]
    assert "replays" in events(happened, StageStarted)[0].frozen
    assert "replays" in events(happened, StageStarted)[1].frozen
    linear = {f"bert.encoder.layer.{block}.{part}.weight" for block in range(3) for part in ("attention.self.query",)}
    assert linear <= kinds["packed"]
    assert not any("layer.3." in name or "classifier" in name or "pooler" in name for name in kinds["packed"])
    assert len(kinds["packed"]) == 3 * 6
    assert all(tensor is torch.float32 for name, tensor in kinds.items() if name not in (*kinds["packed"], "packed"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ways())
def test_plain_peft_puts_it_together(tmp_path: Path, way: dict[str, Any], monkeypatch: Any) -> None:
    root, answers, write = wide(tmp_path), [], apart.write

    def watched(learner: Any, own: Any, folder: Path) -> None:
        with freezing.eval_mode(learner.model):
            answers.append(learner.model(input_ids=IDS, attention_mask=MASK).logits)
        write(learner, own, folder)

    monkeypatch.setattr(apart, "write", watched)
    stages = [stage(unfreeze="@blocks[-2:]", steps=20)]
    model = {"path": "model", "quantization_config": way}
    happened = run(root, model=model, freeze=FROZEN, adapters=[LORA], stages=stages, training={"logging_steps": 4})
    losses = [event.loss for event in events(happened, Step)]
    assert losses[-1] < losses[0]
    assert any("can't be merged" in note.sentence for note in events(happened, Note))
    made = root / "runs/recipe"
    code = re.search(r"```python\n(.*?)```", (made / "adapter/README.md").read_text(), re.DOTALL)
    assert code
    script = f"""
import torch
{code[1]}
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS.tolist()}), attention_mask=torch.tensor({MASK.tolist()})).logits
print("logits", logits.tolist())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.tensor(json.loads(done.stdout.split("logits")[1])), answers[0], atol=1e-6)
    with pytest.raises(RunError, match="no graph can hold"):
        export(made, "onnx", root=root)


def test_without_the_package_it_is_one_sentence(monkeypatch: Any) -> None:
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    for name, package in (("nf4", "bitsandbytes"), ("torchao", "torchao")):
        with pytest.raises(ProblemsError) as caught:
            quantizing.config(Model(path="m", quantization_config=WAYS[name]), [])
        assert caught.value.problems[0].key == ("model", "quantization_config")
        what = f"weights are quantised with the package `{package}`, which is not installed"
        assert caught.value.problems[0].sentence == f"{what}; run `pip install frostline[{package}]`"


def told(root: Path, **keys: Any) -> tuple[tuple[str | int, ...], str]:
    """Key and sentence of the one problem for which a draft is refused."""
    with pytest.raises(ProblemsError) as caught:
        draft(root, **keys)
    (problem,) = caught.value.problems
    assert "\n" not in problem.sentence
    return problem.key, problem.sentence


def test_what_can_not_be_is_one_sentence(tmp_path: Path) -> None:
    root = place(tmp_path)
    opened = stage(unfreeze="@blocks[-2:]")
    vera, pissa = {**LORA, "type": "vera"}, {**LORA, "init_lora_weights": "pissa"}
    merged = opened | {"then": "merge"}
    for way, more, key, words in (
        ({"quant_method": "gptq"}, {}, ("model", "quantization_config"), "has to be `bitsandbytes` or `torchao`"),
        ({"quant_method": "bitsandbytes"}, {}, ("model", "quantization_config"), "to 8 or 4 bits"),
        (WAYS["nf4"], {"adapters": [LORA], "stages": [merged]}, None, "would round what they learned"),
        (WAYS["nf4"], {"adapters": [vera], "stages": [opened]}, ("adapters", 0), "has no layers for"),
        (
            WAYS["nf4"],
            {"adapters": [pissa], "stages": [opened]},
            ("adapters", 0),
            "rewrites weights that are quantised",
        ),
    ):
        model = {"path": "model", "quantization_config": way}
        found, said = told(root, **{"model": model, "freeze": FROZEN, **more})
        assert (found, words in said) == (key or ("model", "quantization_config"), True), said


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="not here")
def test_fields_are_those_of_the_class() -> None:
    way = {**WAYS["nf4"], "bnb_4bit_colour": "red"}
    with pytest.raises(ProblemsError, match="`bnb_4bit_colour` is no field of transformers' BitsAndBytesConfig"):
        quantizing.config(Model(path="m", quantization_config=way), [])
    with pytest.raises(ProblemsError, match="transformers refuses it"):
        quantizing.config(Model(path="m", quantization_config={**WAYS["nf4"], "llm_int8_threshold": "high"}), [])


def test_a_checkpoint_that_is_quantised_already_is_told_of(tmp_path: Path) -> None:
    root = place(tmp_path)
    settings = json.loads((root / "model/config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (root / "model/config.json").write_text(json.dumps(settings))
    key, said = told(root, freeze=FROZEN)
    assert key == ("model", "path")
    assert said.startswith("model is quantised already (gptq), so its weights can't train; take the original")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="not here")
def test_the_plan_knows_what_it_spares(tmp_path: Path) -> None:
    root = wide(tmp_path)
    plain, four = (
        draft(root, model={"path": "model", **more}, freeze=FROZEN).plan.stages[0].forecast.memory.weights
        for more in ({}, {"quantization_config": WAYS["nf4"]})
    )
    linear = 4 * (4 * 64 * 64 + 2 * 64 * 128)
    assert plain - four == 3.5 * linear
