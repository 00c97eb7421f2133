"""Configs of other tools as recipes: what trains is what each tool's own rule would train, and every line is answered.

The configs are real ones, cut down to the keys that matter; each says in its first line where it is from. The rules
are written anew here, from the tools' sources, over names of parameters: none of the reader's code is used for them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

from engine import importing
from engine.cli import main
from engine.errors import RecipeError
from engine.importing import commands, parameters
from engine.importing.base import Given
from engine.importing.ms_swift import COMMAND
from engine.load import load
from engine.modelling import outlining
from engine.outline import Outline
from engine.patterns import select
from engine.planning import openings

CONFIGS = Path(__file__).parent / "importing"
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
ROPED = {**TINY, "num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**ROPED, "num_hidden_layers": 32}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**ROPED, "num_hidden_layers": 16, "tie_word_embeddings": True}),
    "qwen": ("Qwen2ForCausalLM", "Qwen2Config", {**ROPED, "num_hidden_layers": 28}),
    "qwen_tied": ("Qwen2ForCausalLM", "Qwen2Config", {**ROPED, "num_hidden_layers": 28, "tie_word_embeddings": True}),
    "qwen_classes": ("Qwen2ForSequenceClassification", "Qwen2Config", {**ROPED, "num_hidden_layers": 24}),
    "moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**ROPED, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TINY, "num_hidden_layers": 24}),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**TINY, "num_hidden_layers": 12, "relative_attention": True, "norm_rel_ebd": "layer_norm"},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**TINY, "embedding_size": 8}),
}
"""Models of the architectures and layers that the configs are for, but narrow."""

Rule = Callable[[nn.Module, Any], set[str]]
"""A tool's own rule: a model and its config -> names of what trains; adapted modules by `name + LoRA`."""


@cache
def model(architecture: str) -> nn.Module:
    kind, config, sizes = ARCHITECTURES[architecture]
    with torch.device("meta"):
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


@cache
def outline(architecture: str) -> Outline:
    """Its outline without prices, which would take a second for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlining, "_trace", lambda _: ({}, {}, None))
        return outlining.outline(model(architecture))


def carried(name: str, tmp_path: Path, **given: Any) -> Path:
    """The recipe of a config as a file, with its model's folder where the number of layers matters."""
    written = tmp_path / "recipe.yaml"
    written.write_text(importing.carry(CONFIGS / name, given=Given(**given)).text)
    return written


def folder(tmp_path: Path, architecture: str) -> str:
    """A folder with nothing but a config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(ARCHITECTURES[architecture][2]))
    return str(tmp_path / "model")


def trains(recipe: Path, architecture: str) -> list[set[str]]:
    """What each stage trains: names of parameters, and of adapted modules with ` + lora` behind."""
    resolved = openings.resolve(load(recipe).recipe, outline(architecture))
    assert not resolved.problems, [problem.sentence for problem in resolved.problems]
    adapted: set[str] = set()
    stages = []
    for stage in resolved.stages:
        adapted |= {f"{target} + lora" for attached in stage.attaches for target in attached.targets}
        stages.append({*stage.trainable, *adapted})
    return stages


def said(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def words(name: str) -> dict[str, Any]:
    node = commands.read((CONFIGS / name).read_text(), name, COMMAND)
    assert node is not None
    return node.plain()


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


# ---- the rules, from each tool's source


def fts(module: nn.Module, schedule: dict[int, Any]) -> list[set[str]]:
    """fts_supporters._parse_phase: a name, or `re.match`, of a LightningModule's parameters; phases add up."""
    own = {f"model.{name}": name for name in names(module)}
    phases = []
    for depth in sorted(schedule):
        taken: set[str] = set()
        for text in schedule[depth]["params"]:
            matched = [name for name in own if re.compile(rf"{text}").match(name)]
            assert text in own or matched, f"FTS itself would refuse {text}"
            taken |= {own[text]} if text in own else {own[name] for name in matched}
        phases.append(taken | (phases[-1] if phases else set()))
    return phases


def axolotl(module: nn.Module, config: dict[str, Any]) -> set[str]:
    """utils/freeze.py: a range at the end is no part of a pattern, dots are escaped, and `match` is from the start."""
    expressions = []
    for text in config["unfrozen_parameters"]:
        text = re.sub(r"\[[0-9]*(:[0-9]*)?\]$", "", text)
        expressions.append(re.compile(re.sub(r"\.(?!\+)", "\\.", text)))
    return {name for name in names(module) if any(expression.match(name) for expression in expressions)}


def factory_freeze(module: nn.Module, config: dict[str, Any]) -> set[str]:
    """model/adapter.py: substrings such as `.30.mlp`, numbers counted from the config's number of layers."""
    count, number = module.config.num_hidden_layers, config.get("freeze_trainable_layers", 2)
    if config.get("use_llama_pro"):
        stride = count // number
        layers = range(stride - 1, count + stride - 1, stride)
    else:
        layers = range(max(0, count - number), count) if number > 0 else range(min(-number, count))
    parts = []
    for part in config.get("freeze_trainable_modules", "all").split(","):
        parts += [f".{layer}.{'' if part == 'all' else part}" for layer in layers]
    parts += [part.strip() for part in config.get("freeze_extra_modules", "").split(",") if part]
    return {name for name in names(module) if any(part in name for part in parts)}


def swift_full(module: nn.Module, config: dict[str, Any]) -> set[str]:
    """utils/transformers_utils.py: all, less a share, starts of names and a `search`, and then again some."""
    own = names(module)
    sizes = list(accumulate(parameter.numel() for parameter in module.parameters()))
    open_ = set(own)
    if share := config.get("freeze_parameters_ratio", 0):
        open_ -= set(own[: bisect_right(sizes, int(sizes[-1] * share))])
    starts = lambda key: [str(text) for text in many(config.get(key, []))]  # noqa: E731
    open_ -= {name for name in own for start in starts("freeze_parameters") if name.startswith(start)}
    if text := config.get("freeze_parameters_regex"):
        open_ -= {name for name in own if re.compile(text).search(name)}
    open_ |= {name for name in own for start in starts("trainable_parameters") if name.startswith(start)}
    if text := config.get("trainable_parameters_regex"):
        open_ |= {name for name in own if re.compile(text).search(name)}
    return open_


def many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def lora(module: nn.Module, targets: Iterable[str], whole: Sequence[str] = ()) -> set[str]:
    """What PEFT itself adapts by the ends of names, and the modules that it trains as they are."""
    return adapted(module, frozenset(targets)) | {name for name in names(module) if name.split(".")[-2] in whole}


@cache
def adapted(module: nn.Module, targets: frozenset[str]) -> set[str]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.device("meta"):
        copy = type(module)(module.config)
    injected = inject_adapter_in_model(LoraConfig(target_modules=sorted(targets)), copy)
    return {f"{name} + lora" for name, layer in injected.named_modules() if isinstance(layer, BaseTunerLayer)}


def linear_names(module: nn.Module, without: Sequence[str]) -> set[str]:
    """Last segments of all linear layers; each tool leaves out the output, and swift heads as well."""
    linear = {name.split(".")[-1] for name, layer in module.named_modules() if "Linear" in type(layer).__name__}
    return linear - set(without)


def all_linear(module: nn.Module, _: Any) -> set[str]:
    return lora(module, linear_names(module, ["lm_head", "embed_out"]))


def swift_classes(module: nn.Module, _: Any) -> set[str]:
    return lora(module, linear_names(module, ["lm_head", "score", "v_head", "classifier"]), ["score"])


def everything(module: nn.Module, _: Any) -> set[str]:
    return set(names(module))


RTE = {"model": "m", "task": "text-classification", "data": "rte.csv"}
SAME: list[tuple[str, str, Rule]] = [
    ("axolotl/dolphin.yml", "llama", axolotl),
    ("axolotl/spectrum.yml", "llama", axolotl),
    ("axolotl/full.yml", "llama", everything),
    ("axolotl/tiny_llama_lora.yml", "llama", all_linear),
    ("axolotl/llama_lora.yml", "tied", lambda module, config: lora(module, config["lora_target_modules"])),
    ("axolotl/pythia_lora.yml", "pythia", lambda module, config: lora(module, config["lora_target_modules"])),
    ("axolotl/dpo_lora.yml", "llama", all_linear),
    ("llama_factory/llama_pro.yaml", "llama", factory_freeze),
    ("llama_factory/freeze_six.yaml", "qwen_tied", factory_freeze),
    ("llama_factory/freeze_mlp.yaml", "qwen_tied", factory_freeze),
    ("llama_factory/freeze_one.yaml", "llama", factory_freeze),
    ("llama_factory/freeze_all.yaml", "llama", factory_freeze),
    ("llama_factory/full.yaml", "llama", everything),
    ("llama_factory/lora_dpo.yaml", "llama", all_linear),
    ("llama_factory/lora_pretrain.yaml", "llama", all_linear),
    ("llama_factory/pissa.yaml", "llama", all_linear),
    ("llama_factory/loraplus.yaml", "llama", all_linear),
    ("llama_factory/qlora.yaml", "llama", lambda module, config: lora(module, config["lora_target"].split(","))),
    ("swift/probe.sh", "qwen_classes", swift_full),
    ("swift/comma.sh", "qwen", swift_full),
    ("swift/warm_embeddings.sh", "qwen", swift_full),
    ("swift/last_layer_regex.sh", "qwen", swift_full),
    ("swift/experts.sh", "moe", swift_full),
    ("swift/full.sh", "qwen", everything),
    ("swift/lora.sh", "qwen", all_linear),
    ("swift/dpo.sh", "qwen", all_linear),
    ("swift/seq_cls_qwen.sh", "qwen_classes", swift_classes),
]
"""Configs with one stage, the architecture each is for, and the rule of its tool."""

SCHEDULES = [
    ("fts/deberta_base.yaml", "deberta"),
    ("fts/deberta_fsdp.yaml", "deberta"),
    ("fts/deberta_two_phases.yaml", "deberta"),
    ("fts/reinit_lr.yaml", "deberta"),
    ("fts/reinit_optimizer.yaml", "deberta"),
    ("fts/albert.yaml", "albert"),
    ("fts/albert_notebook.yaml", "albert"),
]

REFUSED = {
    "axolotl/reward.yml": ("5:1", "reward_model"),
    "fts/lightning.yaml": ("2:1", "ft_schedule"),
    "llama_factory/reward.yaml": ("6:1", "`rm` has no counterpart"),
    "swift/megatron.sh": ("4:1", "Megatron"),
    "swift/dpo_pictures.yaml": ("3:1", "texts about pictures"),
}

OTHERS = [
    "axolotl/mixtral.yml",
    "axolotl/gemma3_qlora.yml",
    "fts/torchtitan_llama.yaml",
    "llama_factory/badam.yaml",
    "swift/lisa.sh",
    "swift/seq_cls_bert.sh",
]
"""What passes `check` and can't be compared: schedules drawn at random, names that the installed transformers changed,
layers that no recipe adapts."""


def label(value: Any) -> str:
    """A part of a test's name: the same in every process, as an address of a function is not."""
    return getattr(value, "__name__", value)


@pytest.mark.parametrize(("name", "architecture", "rule"), SAME, ids=label)
def test_what_trains_is_what_the_tool_would_train(name: str, architecture: str, rule: Rule, tmp_path: Path) -> None:
    recipe = carried(name, tmp_path, model=folder(tmp_path, architecture))
    config = words(name) if name.endswith(".sh") else said(name)
    expected = rule(model(architecture), config)
    assert expected, "a rule that takes nothing shows nothing"
    assert trains(recipe, architecture) == [expected]


@pytest.mark.parametrize(("name", "architecture"), SCHEDULES)
def test_phases_thaw_what_fts_thaws(name: str, architecture: str, tmp_path: Path) -> None:
    assert trains(carried(name, tmp_path, **RTE), architecture) == fts(model(architecture), said(name))


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_pass_check(name: str, tmp_path: Path) -> None:
    given = RTE if name.startswith("fts") else {}
    assert load(carried(name, tmp_path, **given)).recipe.model.path


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_recipe_is_refused_with_its_place(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["import", str(CONFIGS / name)])
    out, err = capsys.readouterr()
    place, words = REFUSED[name]
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"{CONFIGS / name}:{place}  ")
    assert words in err


def test_every_config_is_tested() -> None:
    known = {name for name, *_ in (*SAME, *SCHEDULES)} | {*REFUSED, *OTHERS}
    files = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.*")}
    assert known == files
    assert all((CONFIGS / name).read_text().startswith("# ") for name in files), "the first line says where it is from"


def test_every_line_is_answered(tmp_path: Path) -> None:
    """A key is carried over, or its place and what becomes of it are told."""
    text = (CONFIGS / "axolotl/tiny_llama_lora.yml").read_text() + "an_invention: 3\nempty_invention:\n"
    config = tmp_path / "lora.yml"
    config.write_text(text)
    notes = {note.key: str(note) for note in importing.carry(config).notes}
    last = len(text.splitlines())
    assert notes["an_invention"] == f"{config}:{last - 1}:1  an_invention: has no counterpart"
    assert "empty_invention" not in notes, "it asks for nothing"
    assert "accelerate config" in notes["bf16"]
    for key in ("load_in_8bit", "tokenizer_type", "output_dir", "evals_per_epoch"):
        assert key in notes
    for key in ("lora_r", "sequence_len", "learning_rate", "val_set_size"):
        assert key not in notes


def test_numbers_of_the_training_come_along(tmp_path: Path) -> None:
    recipe = load(carried("axolotl/dolphin.yml", tmp_path, devices=8)).recipe
    assert (recipe.batch_size, recipe.per_device_batch_size) == (2 * 16 * 8, 2)
    assert (recipe.training.learning_rate, recipe.training.warmup_steps) == (5e-6, 100)
    assert recipe.data.splits.validation == 0.01
    assert recipe.model.pad_token == "<|finetune_right_pad_id|>"
    stage = recipe.stages[0]
    assert (stage.epochs, stage.restore_best) == (3, False)


def test_processes_that_a_script_names_count(tmp_path: Path) -> None:
    recipe = load(carried("swift/comma.sh", tmp_path)).recipe
    assert (recipe.batch_size, recipe.per_device_batch_size) == (1 * 8 * 8, 1)
    assert recipe.model.path == "/absolute/path/to/model/MiMo-7B-RL", "a variable of the script itself"


def test_phases_last_as_long_as_their_last_epochs_say(tmp_path: Path) -> None:
    stages = load(carried("fts/albert.yaml", tmp_path, **RTE)).recipe.stages
    assert [stage.epochs for stage in stages] == [3, 10, 6, 10]
    assert stages[2].learning_rate == {"^albert.encoder.*.ffn_output[^.]*": 1e-6}
    assert all(stage.early_stopping.patience == 3 for stage in stages)


def test_a_number_of_layers_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"hf download Qwen/Qwen2.5-Coder-1.5B-Instruct config.json"):
        importing.carry(CONFIGS / "llama_factory/freeze_mlp.yaml")


def test_a_schedule_needs_what_it_does_not_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, to = str(CONFIGS / "fts/deberta_base.yaml"), tmp_path / "new/recipe.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["import", config, "--model", "m"])
    assert ended.value.code == 2
    assert "give `--task` and `--data`" in capsys.readouterr().err
    options = ["--model", "m", "--task", "text-classification", "--data", "d", "--to", str(to)]
    with pytest.raises(SystemExit) as ended:
        main(["import", config, *options])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (0, f"{to}\n")
    assert "counts no layers" in err
    assert load(to).recipe.model.path == "m"
    with pytest.raises(SystemExit) as ended:
        main(["import", config, *options])
    assert ended.value.code == 2, "nothing is overwritten"


def test_a_share_of_all_parameters_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text("swift sft --model m --train_type full --dataset d.jsonl --freeze_parameters_ratio 0.2\n")
    with pytest.raises(RecipeError, match="counts parameters from the input up"):
        importing.carry(script)


@pytest.mark.parametrize(
    ("content", "tool", "what"),
    [
        ("model: m\ntask: text-classification\ndata: d\n", "", "looks like a config of none of"),
        ("base_model: m\n", "axolotel", "is no tool whose configs can be read"),
        ("base_model: m\n", "", "names no data"),
        ("- a\n", "", "is no mapping of keys"),
        ("base_model: !!python/object:os.system m\n", "", "is a tag"),
        ("base_model: m\ndatasets: [{path: d}]\nlearning_rate: fast\n", "", "has to be a number"),
    ],
)
def test_what_is_no_config_is_refused_in_words(content: str, tool: str, what: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with pytest.raises(RecipeError, match=what):
        importing.carry(config, tool)


CHOICES = [
    ("match", r"model.layers.1", True),
    ("match", r"model\.layers\.(30|31)\.mlp\..*", True),
    ("match", r"model.layers.2[0-9]+.self_attn", True),
    ("match", r"^lm_head.weight$", True),
    ("match", r"model.layers.{0,11}.(mlp|self_attn).*", False),
    ("match", r"model.layers.[0-11].mlp", True),
    ("search", r"mlp\.(gate|up)_proj", True),
    ("search", r".*(self_attn|\.norm\.).*", True),
    ("search", r"^(model\.layers\.(3[01])\.|model\.norm\.)", True),
    ("search", r"model\.layers\.31\.|lm_head|model\.norm|model\.final_layernorm", False),
    ("search", r"norm", True),
    ("search", r".*", True),
]


@pytest.mark.parametrize(("how", "expression", "whole"), CHOICES)
def test_a_rule_about_names_as_patterns_takes_the_same(how: Any, expression: str, whole: bool) -> None:
    own = outline("llama")
    translated = parameters.of_regex(expression, how)
    assert all(each.pattern for each in translated)
    taken = set().union(*(select(str(each.pattern), own).parameters for each in translated))
    expected = {name for name in names(model("llama")) if getattr(re.compile(expression), how)(name)}
    assert expected
    assert taken == expected
    assert any(each.remark for each in translated) or whole or how == "search"


@pytest.mark.parametrize("text", ["model.layers.1", "model.layers.1.", "lm_head", "model.norm.weight", "model"])
def test_a_start_of_names_as_a_pattern_takes_the_same(text: str) -> None:
    pattern = parameters.of_prefix(text).pattern
    assert pattern
    expected = {name for name in names(model("llama")) if name.startswith(text)}
    assert select(pattern, outline("llama")).parameters == expected


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        (r"^(?!point_projector\.).*", "looks ahead"),
        (r"classifier\.bias$", "one bias"),
        (r"model\.layers$", "takes none"),
        (r"x{2000}", "repeats too often"),
    ],
)
def test_what_is_not_about_whole_modules_gives_no_pattern(expression: str, says: str) -> None:
    (translated,) = parameters.of_regex(expression, "search")
    assert translated.pattern is None
    assert says in translated.remark


def test_all_biases_are_a_selector() -> None:
    assert [each.pattern for each in parameters.of_regex(r".*bias.*", "search")] == ["@biases"]
