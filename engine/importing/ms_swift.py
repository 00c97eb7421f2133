"""ms-swift's YAML, JSON and shell commands: full fine-tuning with its five freezing keys, LISA and LoRA.

Of a full fine-tuning all trains; then `freeze_parameters_ratio`, `freeze_parameters` (starts of names) and
`freeze_parameters_regex` (anywhere in a name) freeze, and `trainable_parameters` and `trainable_parameters_regex` open
again, in this order (`swift.pipelines.train.tuner`). A recipe freezes and unfreezes in the same one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

from engine.importing import parameters
from engine.importing.base import (
    Draft,
    Given,
    Tool,
    Words,
    adapt,
    attention,
    data_at,
    held_out,
    override,
    trainer,
)
from engine.importing.config import Config
from engine.importing.parameters import EVERYTHING, Translated

COMMAND = re.compile(r"\b(?:swift|megatron)\s+(?:sft|pt|rlhf)\b|swift/cli/(?:sft|pt|rlhf)\.py")
METHODS = ("tuner_type", "train_type", "sft_type")
TASKS = {"causal_lm": "text-generation", "seq_cls": "text-classification"}
TOWERS = ("freeze_vit", "freeze_aligner", "freeze_llm", "vit_lr", "aligner_lr")


class MsSwift(Tool):
    """https://github.com/modelscope/ms-swift"""

    name = "ms-swift"
    answers: ClassVar = {
        "num_labels": "the labels are read from the data",
        "use_chat_template": "the tokenizer's own template is used",
        "template": "the tokenizer's own template is used",
        "system": "write it into the chats",
        "model_author": "write it into the chats",
        "model_name": "write it into the chats",
        "load_from_cache_file": "rows are encoded and kept by themselves",
        "dataset_num_proc": "rows are encoded as fast as the machine can",
        "truncation_strategy": "what is too long loses its end, and a run says how often",
        "rpo_alpha": "DPO stands alone here, with no loss on the better answer beside it",
        "use_liger_kernel": "there are no kernels to choose from",
        "CUDA_VISIBLE_DEVICES": "it belongs to `accelerate config`",
        "model_type": "the model's own config says what it is",
        "save_only_model": "a checkpoint holds all that a run needs to go on",
        "external_plugins": "a recipe is data and names no code",
        "custom_register_path": "a recipe is data and names no code",
        "lorap_lr_ratio": "both matrices of an adapter learn at one rate",
        "target_parameters": "adapters go to modules",
    }
    silent = frozenset({"command", "NPROC_PER_NODE", "NNODES", "use_hf", "add_version", "check_model"})

    def knows(self, config: Config) -> bool:
        root = config.root.value
        return "command" in root or ("model" in root and any(key in root for key in (*METHODS, "rlhf_type")))

    def read(self, config: Config, given: Given) -> Draft:
        method = next((config.take(key) for key in METHODS if config.has(key)), "lora")
        _refuse(config, method)
        draft = Draft(model={"path": config.take("model") or config.take("model_id_or_path")})
        draft.model["revision"] = config.take("model_revision")
        given = replace(given, devices=given.devices if given.devices > 1 else _devices(config))
        usual = {"batch": 1, "accumulation": 0, "scheduler": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95}
        trainer(config, draft, Words(usual=usual | {"learning_rate": 1e-5 if method == "full" else 1e-4}), given)
        _model(config, draft)
        _task(config, draft)
        _data(config, draft)
        if method == "full":
            _full(config, draft)
        else:
            _lora(config, draft)
        override(draft, given)
        return draft


def _refuse(config: Config, method: Any) -> None:
    if "megatron" in str(config.take("command", "")):
        config.refuse("command", "Megatron's names and shards of a model are not those of transformers")
    if method not in ("full", "lora"):
        key = next(key for key in METHODS if config.has(key))
        config.refuse(key, f"`{method}` can't be carried over", "write PEFT's own kind into `adapters`")
    if (kind := config.take("rlhf_type", "dpo")) != "dpo":
        config.refuse("rlhf_type", f"`{kind}` has no counterpart: of preferences a model learns by DPO")
    if (task := config.take("task_type", "causal_lm")) not in TASKS:
        config.refuse("task_type", f"`{task}` is no task here")
    if re.search(r"\bvl\b|omni|vision|llava|internvl", str(config.take("model", "")).replace("-", " ").lower()):
        config.refuse("model", "texts about pictures are no task here")


def _devices(config: Config) -> int:
    """Processes that the command names: as many batches a step."""
    counts = [config.take(key, 1) for key in ("NPROC_PER_NODE", "NNODES")]
    counts = [count if isinstance(count, int) else 1 for count in counts]
    return counts[0] * counts[1]


def _model(config: Config, draft: Draft) -> None:
    if str(config.take("torch_dtype", "")) in ("bfloat16", "float16"):
        draft.model["dtype"] = config.take("torch_dtype")
    if config.has("quant_bits"):
        config.take("quant_bits")
        draft.model["dtype"] = "bfloat16"
        config.note("quant_bits", "weights are held in bfloat16; `model.quantization_config` would quantise them")
    attention(config, draft, str(config.take("attn_impl", "")))
    if not config.flag("use_hf"):
        config.note("model", "a name of ModelScope; see that the Hub has it by the same")
    for key in TOWERS:
        if config.has(key):
            config.take(key)
            config.note(key, "a model of text alone has no such part")


def _task(config: Config, draft: Draft) -> None:
    task = "seq_cls" if config.has("num_labels") else config.take("task_type", "causal_lm")
    draft.task = {"type": TASKS[task]}
    if config.has("max_length"):
        draft.task["max_length"] = int(config.number("max_length"))
    if config.has("rlhf_type"):
        draft.task |= {"objective": "dpo", "beta": float(config.number("beta", 0.1))}
    elif config.flag("packing"):
        draft.task["packing"] = True


def _data(config: Config, draft: Draft) -> None:
    sets = config.items("dataset")
    if not sets:
        config.refuse("dataset", "names no data", "give `--data`")
    # NAME:SUBSET#ROWS
    said = re.fullmatch(r"(?:HF::|MS::)?([^:#]+)(?::([^#]+))?(?:#(\d+))?", str(sets[0].value))
    if said is None:
        config.refuse("dataset", f"`{sets[0].value}` can't be read as one data set", "give `--data`")
    draft.data = data_at(said[1])
    draft.data["name"] = said[2]
    if said[3]:
        draft.data["splits"] = {"train": f"train[:{said[3]}]"}
        config.note("dataset", "the first rows train, not some at random")
    for other in sets[1:]:
        config.note("dataset", "a recipe has one data set; join this one to it", other.place)
    if "data_files" in draft.data and config.has("val_dataset"):
        draft.data["data_files"]["validation"] = config.take("val_dataset")
    _held_out(config, draft)


def _held_out(config: Config, draft: Draft) -> None:
    share = config.number("split_dataset_ratio")
    if share and share < 1:
        draft.data.setdefault("splits", {})["validation"] = float(share)
    elif "validation" not in draft.data.get("data_files", {}):
        held_out(draft, config, "split_dataset_ratio", None)


def _full(config: Config, draft: Draft) -> None:
    if lisa := int(config.number("lisa_activated_layers", 0)):
        steps = int(config.number("lisa_step_interval", 20))
        draft.freeze = ["@blocks"]
        draft.remarks["stages"] = "LISA: how many draws there are followed from the data; here `stages` says it."
        draft.generated = {"type": "lisa", "stages": 10, "steps": steps, "blocks_per_stage": lisa}
        return
    frozen = [*_ratio(config), *_prefixes(config, "freeze_parameters"), *_regex(config, "freeze_parameters_regex")]
    opened = [*_prefixes(config, "trainable_parameters"), *_regex(config, "trainable_parameters_regex")]
    # Behind everything, nothing is left to freeze, and a pattern that does nothing is refused.
    draft.freeze = [EVERYTHING] if EVERYTHING in frozen else list(dict.fromkeys(frozen))
    if opened and frozen:
        draft.unfreeze(*opened)


def _ratio(config: Config) -> list[str]:
    """A share of all parameters, from the input up; all of them is what can be said without their sizes."""
    share = config.number("freeze_parameters_ratio", 0)
    if share >= 1:
        return [EVERYTHING]
    if share > 0:
        what = "counts parameters from the input up, and a recipe says which modules they are"
        config.refuse("freeze_parameters_ratio", what, 'write `freeze_parameters: [...]`, or `freeze: "@blocks[:6]"`')
    return []


def _prefixes(config: Config, key: str) -> list[str]:
    found = []
    for item in config.items(key):
        text = str(item.value)
        known = Translated(None, "is one start of a name with a comma in it, which no name has; use spaces")
        found += _said(config, key, text, known if "," in text else parameters.of_prefix(text), item.place)
    return found


def _regex(config: Config, key: str) -> list[str]:
    if not config.has(key):
        return []
    text = str(config.take(key))
    try:
        every = parameters.of_regex(text, "search")
    except ValueError as error:
        config.note(key, f"{error}; swift warns of it and goes on without")
        return []
    place = config.place(key)
    return [pattern for translated in every for pattern in _said(config, key, text, translated, place)]


def _said(config: Config, key: str, text: str, translated: Translated, place: Any) -> list[str]:
    """The pattern of a rule as a list, once what is to be said of it is said."""
    if translated.remark:
        config.note(key, f"`{text}`: {translated.remark}", place)
    return [translated.pattern] if translated.pattern else []


def _lora(config: Config, draft: Draft) -> None:
    fields: dict[str, Any] = {
        "r": config.number("lora_rank", 8),
        "lora_alpha": config.number("lora_alpha", 32),
        "lora_dropout": config.number("lora_dropout", 0.05),
    }
    for key in ("use_rslora", "use_dora"):
        if config.flag(key):
            fields[key] = True
    if (start := str(config.take("init_weights", "true"))).lower() not in ("true", "false"):
        fields["init_lora_weights"] = start
    targets = [name for item in config.items("target_modules") for name in str(item.value).split(",")]
    if config.has("target_regex"):
        targets = [f"^(?:{config.take('target_regex')})"]
    whole = config.words("modules_to_save")
    if draft.task["type"] == "text-classification":
        whole.append("classifier|score")  # PEFT trains the new head of a classifier by itself
        if targets in ([], ["all-linear"]):
            config.note("target_modules", "linear layers outside of the blocks, such as a pooler, get no adapter")
    adapt(draft, fields, [] if targets in ([], ["all-linear"]) else targets, whole)
