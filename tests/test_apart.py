"""Every kind of adapter of the installed PEFT through a whole run: which train, which are refused and in which words.

What trains is written down apart from its model and put together again in a clean process by the lines of its README.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import staged
import tiny
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from running import FROZEN, events, place, refused, run, stage
from safetensors.torch import load_file
from test_prompts import KINDS as VIRTUAL_KINDS

from engine.adapters import UNFIT, WHOLE, config
from engine.export import export
from engine.prompts import PROMPTS, TASKS
from engine.records import Proved, Step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),  # BOFT does without it
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "beft": {},
    "boft": {},
    "c3a": {"block_size": 8},
    "deft": {},
    "delora": {"r": 2},
    "fourierft": {"n_frequency": 40},
    "glora": {"r": 2},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "hra": {"r": 2},
    "ia3": {"feedforward_modules": ["output.dense|mlp.down_proj"]},
    "ln_tuning": {},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "lora": {"r": 4},
    "miss": {"r": 2},
    "oft": {"oft_block_size": 8},
    "osf": {},
    "peanut": {"r": 2},
    "psoft": {"r": 4},
    "randlora": {"r": 2},
    "road": {"group_size": 8},
    "tinylora": {},
    "unilora": {},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 40},
}
"""Kinds that train, with what they need on layers of 16."""
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "rslora": {"type": "lora", "r": 4, "use_rslora": True},
    "pissa": {"type": "lora", "r": 4, "init_lora_weights": "pissa"},
    "pissa fast": {"type": "lora", "r": 4, "init_lora_weights": "pissa_niter_4"},
    "olora": {"type": "lora", "r": 4, "init_lora_weights": "olora"},
    "ranks by layer": {"type": "lora", "r": 4, "rank_pattern": {"query": 2}},
}
QUICK = ("vera", "pissa")
"""Tried by default; the others take minutes."""
NO_LLAMA = {
    "beft": "PEFT can't merge it into a Linear (Base layer has no bias, cannot merge bias adapter beft), so no run "
    "could save what it learned",
}
"""Kinds that a Llama can't have, and the sentence: it has no biases."""
BERT, LLAMA = ["query", "value", "output.dense"], ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def asked() -> list[Any]:
    """Each kind and variant; slow where it isn't among the quick."""
    named = {kind: {"type": kind, **fields} for kind, fields in KINDS.items()} | VARIANTS
    return [
        pytest.param(adapter, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, adapter in named.items()
    ]


def test_every_kind_of_the_installed_peft_is_tried_or_refused() -> None:
    configs = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    whole = without_targets()
    assert configs.keys() == KINDS.keys() | UNFIT.keys() | whole | set(PROMPTS)
    assert not (KINDS.keys() | set(PROMPTS)) & (UNFIT.keys() | whole)


def without_targets() -> set[str]:
    """Kinds that go to a model as a whole, but for virtual tokens."""
    configs = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    fields = {name: {field.name for field in dataclasses.fields(config)} for name, config in configs.items()}
    return {name for name in configs if "target_modules" not in fields[name]} - set(PROMPTS)


VIRTUAL = """
## Virtual tokens

They go to a model and not to modules, so no pattern opens them. A prompt is on, and trains, from the stage that lists
it (the first, where the recipe lists it) to the one that says `then: drop`, whatever is frozen; a stage that lists none
before it leaves it out. A model has one at a time; kinds on modules may train beside it. In a mapping of rates it
counts as part of the embeddings: `learning_rate: {"@embeddings": 1e-2}`.

- `then: merge` is refused: virtual tokens are no weights. Kept to the end, they are saved in the run's `adapter/` as
  PEFT saves them; `model/` is the model without them, and `frostline export` hands on `--to adapter` alone.
- They change every layer, so nothing lies below the frost line while one is on, and nothing is replayed; the plan says
  so.
- They take up positions: texts are cut by so many tokens more.
- Refused in a sentence: `packing`, FSDP2, `activation_checkpointing` with keys and values, and a GPT-like model that
  judges a text by its last token together with tokens before the text (`prefix_tuning` trains there).
"""


def table() -> str:
    """docs/adapters.md: what the tests here try, and the sentences of what is refused."""
    lines = [
        "# Adapters",
        "",
        "Every kind of the installed PEFT by its `type`. A kind that trains has been put on a BERT and on a Llama,",
        "trained for 20 steps with a falling loss, proved to have left alone what is frozen, and put together again",
        "from its folder in a clean process. All others are refused before anything trains. Written by",
        "`tests/test_apart.py`.",
        "",
        "## On modules",
        "",
        "Unfreezing a module trains the adapters inside it; where there are none, its weights.",
        "",
        "| `type` | BERT | Llama | keys that the test gives it |",
        "|---|---|---|---|",
    ]
    for kind, fields in KINDS.items():
        llama = f"refused: {NO_LLAMA[kind]}" if kind in NO_LLAMA else "trains"
        keys = ", ".join(f"`{key}: {value}`" for key, value in fields.items())
        lines.append(f"| `{kind}` | trains | {llama} | {keys} |")
    for name, fields in VARIANTS.items():
        keys = ", ".join(f"`{key}: {value}`" for key, value in fields.items() if key != "type")
        lines.append(f"| `lora` ({name}) | trains | | {keys} |")
    lines += ["", *VIRTUAL.strip().splitlines(), "", "| `type` | trains with | keys that the test gives it |"]
    lines.append("|---|---|---|")
    for kind, fields in VIRTUAL_KINDS.items():
        keys = ", ".join(f"`{key}: {value}`" for key, value in fields.items())
        lines.append(f"| `{kind}` | {', '.join(auto.removeprefix('AutoModelFor') for auto in TASKS[kind])} | {keys} |")
    lines += ["", "## Refused", "", "| `type` | why |", "|---|---|"]
    lines += [f"| `{kind}` | {UNFIT.get(kind, WHOLE)} |" for kind in sorted(UNFIT.keys() | without_targets())]
    return "\n".join(line.replace("dense|mlp", "dense\\|mlp") for line in lines) + "\n"


def test_the_table_of_adapters_is_what_is_tried_here() -> None:
    document = Path(__file__).parent.parent / "docs/adapters.md"
    assert document.read_text(encoding="utf-8") == table()


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning")
@pytest.mark.parametrize("kind", sorted(NO_LLAMA))
def test_what_a_llama_can_not_have_is_one_sentence(tmp_path: Path, kind: str) -> None:
    root = place(tmp_path, tiny.llama())
    tiny.byte_level().save_pretrained(root / "model")
    adapter = {"type": kind, **KINDS[kind], "target_modules": LLAMA}
    task, freeze = {"type": "text-generation", "max_length": 32}, ["@embeddings", "@blocks", "@head"]
    key, said = refused(root, task=task, freeze=freeze, adapters=[adapter], stages=[stage(unfreeze="@blocks[-2:]")])
    assert (key, NO_LLAMA[kind]) == (("adapters", 0), said)


def test_refusals_are_one_sentence_each(tmp_path: Path) -> None:
    for kind in (*UNFIT, *without_targets()):
        with pytest.raises(ValueError, match=f"^`{kind}` [^.]*$") as caught:
            config(kind, {}, ["query"])
        print(f"| `{kind}` | {caught.value} |")
    adapter = {"type": "xlora", "target_modules": "query"}
    key, said = refused(place(tmp_path), freeze=FROZEN, adapters=[adapter], stages=[stage(unfreeze="@blocks[-2:]")])
    assert key == ("adapters", 0)
    assert said == f"`xlora` {WHOLE}"


@pytest.mark.parametrize("adapter", asked())
def test_it_trains_and_is_put_together_again(tmp_path: Path, adapter: dict[str, Any]) -> None:
    """Its loss falls, what is frozen stays (the run proves it), and its README's lines give the run's logits."""
    root = place(tmp_path)
    adapter = {**adapter, "target_modules": BERT}
    stages = [stage("adapted", unfreeze=["@blocks[-2:]", "@norms"], steps=20, learning_rate=2e-2)]
    happened = run(root, freeze=FROZEN, adapters=[adapter], stages=stages, training={"logging_steps": 4})
    losses = [event.loss for event in events(happened, Step)]
    assert losses[-1] < losses[0]
    assert events(happened, Proved)[0].still > 0
    assert put_together(root, "AutoModelForSequenceClassification", "[[2, 5, 7, 9, 11, 3]]") <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NO_LLAMA])
def test_it_trains_a_llama(tmp_path: Path, kind: str) -> None:
    root = place(tmp_path, tiny.llama())
    tiny.byte_level().save_pretrained(root / "model")
    adapter = {"type": kind, **KINDS[kind], "target_modules": LLAMA}
    stages = [stage("adapted", unfreeze="@blocks[-2:]", steps=20, learning_rate=2e-2)]
    happened = run(
        root,
        task={"type": "text-generation", "max_length": 32},
        freeze=["@embeddings", "@blocks", "@head"],
        adapters=[adapter],
        stages=stages,
        training={"logging_steps": 4},
    )
    losses = [event.loss for event in events(happened, Step)]
    assert losses[-1] < losses[0]
    assert put_together(root, "AutoModelForCausalLM", "[[2, 5, 7, 9, 11, 3]]") <= 1e-5


@pytest.mark.slow
def test_exported_adapters_are_put_together_as_well(tmp_path: Path) -> None:
    root = place(tmp_path, tiny.bert())
    adapter = {"type": "lora", "r": 4, "target_modules": ["query", "value"]}
    run(root, freeze=FROZEN, adapters=[adapter], stages=[stage(unfreeze="@blocks[-2:]", steps=4)])
    folder, _ = export(root / "runs/recipe", "adapter", root=root)
    assert put_together(root, "AutoModelForSequenceClassification", "[[2, 5, 7, 9, 11, 3]]", folder) <= 1e-5


def put_together(root: Path, auto: str, ids: str, adapter: Path | None = None) -> float:
    """Run the README's own code in a clean process; how far its logits are from those of the merged model."""
    made = root / "runs/recipe"
    readme = ((adapter or made / "adapter") / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code
    script = f"""
import torch, transformers
transformers.utils.logging.disable_progress_bar()
{code[1].replace("'model'", repr(str(root / "model")))}
merged = transformers.{auto}.from_pretrained({str(made / "model")!r}).eval()
ids = torch.tensor({ids})
with torch.no_grad():
    ours, other = model(input_ids=ids).logits, merged(input_ids=ids).logits
print("apart", float((ours - other).abs().max()), float(other.std()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=adapter or made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    apart, spread = map(float, done.stdout.split("apart")[1].split())
    assert spread > 1e-4
    return apart


def test_two_kinds_on_different_parts_and_weights_beside_them(tmp_path: Path) -> None:
    root = place(tmp_path)
    first = {"type": "lora", "r": 2, "target_modules": "query"}
    kinds = [
        {"type": "lora", "r": 2, "target_modules": "query|value"},
        {"type": "ia3", "target_modules": "key"},
    ]
    stages = [
        stage("below", unfreeze="@blocks[0]", adapters=[first], then="merge"),
        stage("above", freeze="@blocks[0]", unfreeze=["@blocks[-2:]", "@norms"], adapters=kinds, steps=8),
    ]
    happened = run(root, freeze=FROZEN, stages=stages)
    assert sorted(path.name for path in (root / "runs/recipe/adapter").iterdir() if path.is_dir()) == ["ia3", "lora2"]
    own = load_file(root / "runs/recipe/adapter/weights.safetensors")
    assert {"classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"} <= own.keys()
    assert not any("lora" in name or "encoder.layer.3.attention.self" in name for name in own)
    assert events(happened, Proved)
    assert put_together(root, "AutoModelForSequenceClassification", "[[2, 5, 7, 9, 11, 3]]") <= 1e-6


def test_merged_or_dropped_there_is_nothing_apart(tmp_path: Path) -> None:
    root = place(tmp_path)
    adapter = {"type": "lora", "r": 2, "target_modules": "query"}
    for then in ("merge", "drop"):
        run(root, freeze=FROZEN, adapters=[adapter], stages=[stage(unfreeze="@blocks[-2:]", then=then)])
        assert not (root / "runs/recipe/adapter").exists()


def test_what_rewrites_weights_can_not_be_dropped(tmp_path: Path) -> None:
    adapter = {"type": "lora", "r": 2, "target_modules": "query", "init_lora_weights": "pissa"}
    stages = [stage(unfreeze="@blocks[-2:]", then="drop")]
    _, said = refused(place(tmp_path), freeze=FROZEN, adapters=[adapter], stages=stages)
    assert "can't be dropped" in said


def test_feedforward_modules_are_patterns_too(tmp_path: Path) -> None:
    adapter = {"type": "ia3", "target_modules": "query", "feedforward_modules": "output.dense"}
    key, said = refused(place(tmp_path), freeze=FROZEN, adapters=[adapter], stages=[stage(unfreeze="@blocks[-2:]")])
    assert (key, "names none of the modules that are adapted" in said) == (("adapters", 0, "feedforward_modules"), True)


@pytest.mark.parametrize("start", [*(pytest.param(s, marks=pytest.mark.slow) for s in (True, "pissa")), "olora"])
def test_lora_merged_then_weights_then_a_second_lora_cut_off_in_each_stage(tmp_path: Path, start: Any) -> None:
    lora = {"type": "lora", "target_modules": ["query", "value"], "r": 2, "init_lora_weights": start}
    stages = [
        {"name": "head", "steps": 3},
        {"name": "lora", "unfreeze": "@blocks", "adapters": [lora], "steps": 3, "then": "merge"},
        {"name": "full", "freeze": "@blocks", "unfreeze": "@blocks[-2:]", "steps": 3},
        {"name": "again", "unfreeze": "@blocks[-3:]", "adapters": [lora], "steps": 3},
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
    assert cuts >= 4
    assert staged.equal(staged.weights(whole), staged.weights(cut))
    for name in ("adapter_model", "weights"):
        one, other = (load_file(staged.folder(root) / f"adapter/{name}.safetensors") for root in (whole, cut))
        assert staged.equal(one, other)
    assert staged.history(whole) == staged.history(cut)
    before = load_file(whole / "model/model.safetensors")
    moved = {name for name, value in staged.weights(whole).items() if not torch.equal(value, before[name])}
    assert {f"bert.encoder.layer.{block}.attention.self.query.weight" for block in range(4)} <= moved
    assert not any("embeddings" in name for name in moved)
