"""LLaMA-Factory's YAML: `finetuning_type` full, freeze or lora; stages sft, pt and dpo.

What `freeze` trains follows from names such as `.30.mlp`, whose numbers it counts from the model's own number of
layers (`llamafactory.model.adapter`): the last ones, the first ones where the number is negative, or those that
LLaMA Pro has put in between.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from engine.importing.base import (
    Draft,
    Given,
    Tool,
    Words,
    adapt,
    attention,
    data_at,
    half,
    held_out,
    override,
    trainer,
)
from engine.importing.config import Config
from engine.importing.parameters import of_regex
from engine.importing.sizes import layers, tied

PICTURES = ("freeze_vision_tower", "freeze_multi_modal_projector", "image_max_pixels", "video_max_pixels")


class LlamaFactory(Tool):
    """https://github.com/hiyouga/LLaMA-Factory"""

    name = "llama-factory"
    answers: ClassVar = {
        "template": "the tokenizer's own template is used",
        "dataset_dir": "files are named by their path",
        "overwrite_cache": "rows are encoded anew whenever they have changed",
        "preprocessing_num_workers": "rows are encoded as fast as the machine can",
        "plot_loss": "every run draws its curves into `report.html`",
        "save_only_model": "a checkpoint holds all that a run needs to go on",
        "ddp_timeout": "it belongs to `accelerate config`",
        "pissa_convert": "`then: merge` or `keep` says what becomes of the adapter",
        "loraplus_lr_ratio": "both matrices of an adapter learn at one rate",
        "use_galore": "no optimizer here projects gradients",
        "neftune_noise_alpha": "nothing adds noise to embeddings",
        "adapter_name_or_path": "an adapter to start from can't be read; merge it into the model first",
        "mask_history": "every turn of the assistant has a loss",
        "train_on_prompt": "the prompt has none",
    }
    silent = frozenset({"do_train", "do_eval", "badam_verbose", "overwrite_output_dir"})

    def knows(self, config: Config) -> bool:
        keys = config.root.value
        return "model_name_or_path" in keys and ("finetuning_type" in keys or "stage" in keys)

    def read(self, config: Config, given: Given) -> Draft:
        _refuse(config)
        draft = Draft(model={"path": config.take("model_name_or_path"), "revision": config.take("model_revision")})
        trainer(config, draft, Words(), given)
        half(config, draft, "bf16", "pure_bf16")
        if config.has("quantization_bit"):
            config.take("quantization_bit")
            draft.model["dtype"] = "bfloat16"
            what = "weights are held in bfloat16 here; `model.quantization_config` would quantise them"
            config.note("quantization_bit", what)
        attention(config, draft, str(config.take("flash_attn", "")))
        _task(config, draft)
        _data(config, draft)
        method = config.take("finetuning_type", "lora")
        if method == "lora":
            _lora(config, draft)
        elif method == "freeze":
            _freeze(config, draft, given)
        _badam(config, draft)
        override(draft, given)
        return draft


def _refuse(config: Config) -> None:
    stage = config.take("stage", "sft")
    if stage not in ("sft", "pt", "dpo"):
        config.refuse("stage", f"`{stage}` has no counterpart: a model learns texts, or by DPO of preferences")
    if (loss := config.take("pref_loss", "sigmoid")) != "sigmoid":
        config.refuse("pref_loss", f"`{loss}` has no counterpart: of preferences a model learns by DPO")
    if "do_train" in config.root.value and not config.flag("do_train"):
        config.refuse("do_train", "this config trains nothing")
    if key := next((key for key in PICTURES if key in config.root.value), None):
        config.refuse(key, "texts about pictures are no task here")
    if (method := config.take("finetuning_type", "lora")) not in ("lora", "freeze", "full"):
        config.refuse("finetuning_type", f"`{method}` can't be carried over", "write PEFT's own kind into `adapters`")


def _task(config: Config, draft: Draft) -> None:
    draft.task = {"type": "text-generation", "max_length": int(config.number("cutoff_len", 2048))}
    stage = config.take("stage", "sft")
    if stage == "dpo":
        draft.task |= {"objective": "dpo", "beta": float(config.number("pref_beta", 0.1))}
    elif config.flag("packing", stage == "pt") or config.flag("neat_packing"):
        draft.task["packing"] = True


def _data(config: Config, draft: Draft) -> None:
    names = config.words("dataset")
    if not names:
        config.refuse("dataset", "names no data", "give `--data`")
    draft.data = _entry(Path(config.file).parent, names[0], str(config.take("dataset_dir", "data")))
    if rows := config.number("max_samples"):
        draft.data["splits"] = {"train": f"train[:{int(rows)}]"}
    for name in names[1:]:
        config.note("dataset", f"a recipe has one data set; join `{name}` to it")
    what = f"`{names[0]}` is an entry of LLaMA-Factory's dataset_info.json; see that the file is the one it names"
    config.note("dataset", f"{what}, and that `prompt` holds the whole prompt")
    if config.has("eval_dataset"):
        config.take("eval_dataset")
        config.note("eval_dataset", "write its file into `data.data_files` as `validation`")
    held_out(draft, config, "val_size", config.number("val_size"))


def _entry(folder: Path, name: str, data: str) -> dict[str, Any]:
    """Where LLaMA-Factory's own list of data says that a data set lies; else where it mostly does."""
    from engine.grammar.reading import read

    for place in (folder / data, Path(data)):
        listed = place / "dataset_info.json"
        if listed.is_file():
            root, _ = read(listed.read_bytes(), str(listed))
            entry = (root.plain() if root and isinstance(root.value, dict) else {}).get(name) or {}
            if where := entry.get("hf_hub_url") or (entry.get("file_name") and f"{place}/{entry['file_name']}"):
                return data_at(where) | ({"name": entry["subset"]} if entry.get("subset") else {})
    return data_at(f"{data}/{name}.json")


def _lora(config: Config, draft: Draft) -> None:
    rank = config.number("lora_rank", 8)
    fields = {"r": rank, "lora_alpha": config.number("lora_alpha", rank * 2)}
    for key in ("lora_dropout", "use_rslora", "use_dora"):
        if config.has(key):
            fields[key] = config.take(key)
    if config.flag("pissa_init"):
        rounds = int(config.number("pissa_iter", 16))
        fields["init_lora_weights"] = "pissa" if rounds == -1 else f"pissa_niter_{rounds}"
    targets = config.words("lora_target")
    adapt(draft, fields, [] if targets in ([], ["all"]) else targets, config.words("additional_target"))


def _freeze(config: Config, draft: Draft, given: Given) -> None:
    number = int(config.number("freeze_trainable_layers", 2))
    modules = config.words("freeze_trainable_modules") or ["all"]
    opened = []
    if config.flag("use_llama_pro"):
        count = _count(config, given, "use_llama_pro")
        stride = count // number
        opened += _layers(list(range(stride - 1, count, stride)), modules, f"@blocks[{stride - 1}::{stride}]")
    elif number > 0:
        known = modules == ["all"] or _count(config, given, "freeze_trainable_modules")
        last = list(range(max(0, known - number), known)) if modules != ["all"] else []
        opened += _layers(last, modules, f"@blocks[-{number}:]")
    elif number < 0:
        opened += _layers(list(range(-number)), modules, f"@blocks[:{-number}]")
    draft.unfreeze(*opened, *_extra(config, given))


def _extra(config: Config, given: Given) -> list[str]:
    """Modules outside of the layers, which LLaMA-Factory looks for anywhere in a name."""
    found = []
    for name in config.words("freeze_extra_modules"):
        (translated,) = of_regex(re.escape(name), "search")
        found.append(str(translated.pattern))
        if found[-1] != name:
            what = f"`{name}` is looked for anywhere in a name, so all that hold it train, in every layer"
            config.note("freeze_extra_modules", what)
    ends = {"embed_tokens", "lm_head"} & set(found)
    if len(ends) == 1 and (one := tied(given.model or str(config.take("model_name_or_path")))) is not False:
        if one:
            found += {"embed_tokens", "lm_head"} - ends
        what = "`embed_tokens` and `lm_head` are one tensor" + ("" if one else " in many a model; then name both")
        config.note("freeze_extra_modules", what)
    return found


def _layers(numbers: list[int], modules: list[str], selector: str) -> list[str]:
    """Patterns of some modules in the layers of these numbers, as in `.30.mlp`; all of a layer is a block."""
    if "all" in modules:
        return [selector]
    which = "|".join(map(str, numbers))
    which = f"({which})" if len(numbers) > 1 else which
    return [f"{which}.{module}[^.]*" for module in modules]


def _count(config: Config, given: Given, key: str) -> int:
    """How many layers the model has, which its config.json says."""
    model = given.model or str(config.take("model_name_or_path"))
    if not (count := layers(model)):
        what = f"which layers it means follows from how many `{model}` has, and its config.json isn't on this machine"
        config.refuse(key, what, f"fetch it by `hf download {model} config.json`, or name its folder by `--model`")
    return count


def _badam(config: Config, draft: Draft) -> None:
    """BAdam is a schedule here."""
    if not config.flag("use_badam"):
        return
    if config.take("badam_mode", "layer") != "layer":
        config.refuse("badam_mode", "only whole blocks take turns here", "write `badam_mode: layer`")
    order = {"ascending": "ascending", "descending": "descending", "random": "random"}
    mode = order.get(str(config.take("badam_switch_mode", "ascending")))
    steps = int(config.number("badam_switch_interval", 50))
    draft.remarks["stages"] = "BAdam: one block at a time. `cycles` says how often each has its turn."
    draft.generated = {"type": "block_coordinate", "cycles": 1, "steps": steps, **({"order": mode} if mode else {})}
