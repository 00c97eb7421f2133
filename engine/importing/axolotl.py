"""Axolotl's YAML: LoRA, full fine-tuning, and `unfrozen_parameters`.

`unfrozen_parameters` are regular expressions that are matched from the start of a parameter's name, after every dot in
them, but one before a plus, has been given a backslash (`axolotl.utils.freeze`). Both surprise, and both are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from engine.grammar.reading import Node
from engine.importing import parameters
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

INSIDE = re.compile(r"\^?(\w+_layernorm|self_attn|mlp|block_sparse_moe|attention|layers|norm)\b")
"""Names of what lies inside of language models: no parameter's name starts with them."""
ROWS = re.compile(r"(.+)\[[0-9]*(?::[0-9]*)?\]")
QUANTISED = "weights are held in bfloat16 here; `model.quantization_config` would quantise them"
NEVER = "matches from the start of a name, and none starts so: axolotl trains nothing by it"


class Axolotl(Tool):
    """https://github.com/axolotl-ai-cloud/axolotl"""

    name = "axolotl"
    answers: ClassVar = {
        "strict": "every key is checked here",
        "train_on_inputs": "the loss is on completions alone here, or on the assistant's turns",
        "group_by_length": "examples are grouped by length anyway: `training.train_sampling_strategy`",
        "pad_to_sequence_len": "batches are padded to their own longest example",
        "eval_sample_packing": "what judges is packed as what trains",
        "evals_per_epoch": "it is judged once an epoch, or every `evaluation.eval_steps` steps",
        "saves_per_epoch": "an epoch's end has a checkpoint anyway; `training.save_steps` adds some between",
        "chat_template": "the tokenizer's own template is used",
        "loss_watchdog_threshold": "a run stops by itself where its loss is no number any more",
        "loss_watchdog_patience": "a run stops by itself where its loss is no number any more",
        "lora_fan_in_fan_out": "PEFT sees by itself which way round a layer's weights lie",
        "dataset_prepared_path": "rows are encoded and kept by themselves",
        "tokens": "new tokens can't be added",
        "eot_tokens": "the tokenizer's own template ends a turn",
        "loraplus_lr_ratio": "both matrices of an adapter learn at one rate",
        "tokenizer_type": "the model brings its own",
        "model_type": "the task says which class of transformers is taken",
    }
    silent = frozenset({"is_llama_derived_model", "is_mistral_derived_model", "lora_model_dir", "debug", "local_rank"})

    def knows(self, config: Config) -> bool:
        return "base_model" in config.root.value

    def read(self, config: Config, given: Given) -> Draft:
        _refuse(config)
        draft = Draft(model={"path": config.take("base_model"), "revision": config.take("revision_of_model")})
        usual = {"epochs": 1.0, "batch": 1, "scheduler": "cosine"}
        usual |= {} if config.has("warmup_steps", "warmup_ratio") else {"warmup": 0.03}
        words = Words("num_epochs", "micro_batch_size", "eval_batch_size", "lr_scheduler", "optimizer", usual)
        trainer(config, draft, words, given)
        _model(config, draft)
        _task(config, draft)
        _data(config, draft)
        if patience := config.number("early_stopping_patience"):
            draft.stages[0]["early_stopping"] = {"metric": "loss", "patience": int(patience)}
        if config.has("adapter"):
            _adapter(config, draft)
        elif config.has("unfrozen_parameters"):
            draft.unfreeze(*_unfrozen(config))
        override(draft, given)
        return draft


def _refuse(config: Config) -> None:
    """What no task here does."""
    if config.flag("reward_model") or config.flag("process_reward_model"):
        key = "reward_model" if config.has("reward_model") else "process_reward_model"
        config.refuse(key, "a reward model is trained by no task here")
    if config.has("rl") and config.take("rl") != "dpo":
        config.refuse("rl", f"`{config.take('rl')}` has no counterpart: of preferences a model learns by DPO")
    if config.has("processor_type"):
        config.refuse("processor_type", "texts about pictures or sounds are no task here")
    if (kind := config.take("adapter")) not in (None, "", "lora", "qlora"):
        config.refuse("adapter", f"`{kind}` can't be carried over", "write PEFT's own kind into `adapters`")


def _model(config: Config, draft: Draft) -> None:
    half(config, draft, "bf16", "bfloat16")
    for key in ("load_in_4bit", "load_in_8bit"):
        if config.flag(key):
            draft.model["dtype"] = "bfloat16"
            config.note(key, QUANTISED)
    asked = config.take("attn_implementation") or config.take("attention")
    asked = asked or next((name for key, name in _ATTENTION.items() if config.flag(key)), "")
    attention(config, draft, str(asked))
    tokens = config.take("special_tokens") or {}
    draft.model["pad_token"] = tokens.get("pad_token")
    if others := [name for name in tokens if name != "pad_token" and tokens[name]]:
        config.note("special_tokens", f"the tokenizer keeps its own {', '.join(others)}")


_ATTENTION = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}


def _task(config: Config, draft: Draft) -> None:
    draft.task = {"type": "text-generation", "max_length": int(config.number("sequence_len", 512))}
    packs = config.flag("sample_packing")
    if config.take("rl") == "dpo":
        draft.task |= {"objective": "dpo", "beta": float(config.number("rl_beta", 0.1))}
    elif packs:
        draft.task["packing"] = True


def _data(config: Config, draft: Draft) -> None:
    sets = config.items("datasets") or config.items("pretraining_dataset")
    if not sets:
        config.refuse("datasets", "names no data", "give `--data`")
    first, *others = sets
    said = first.plain() if isinstance(first.value, dict) else {"path": first.value}
    files = said.get("data_files")
    draft.data = data_at(files[0] if isinstance(files, list) else files) if files else data_at(str(said.get("path")))
    draft.data["name"] = said.get("name")
    if split := said.get("split"):
        draft.data["splits"] = {"train": split}
    for other in others:
        config.note("datasets", "a recipe has one data set; join this one to it", other.place)
    _form(config, first, str(said.get("type") or ""))
    held_out(draft, config, "val_set_size", config.number("val_set_size"))


def _form(config: Config, node: Node, form: str) -> None:
    """What is to be said of how rows become texts."""
    place = node.keys.get("type", node.place)
    if form.startswith(("chat_template", "sharegpt", "chatml")):
        config.note("datasets", f"`{form}`: chats are read from `messages`, by the tokenizer's own template", place)
    elif form and form not in ("completion", "pretrain"):
        what = f"`{form}` puts rows into a prompt; here `prompt` is all of it, so write it out in the rows"
        config.note("datasets", what, place)


def _adapter(config: Config, draft: Draft) -> None:
    fields = {
        "r": config.number("lora_r", 8),
        "lora_alpha": config.number("lora_alpha", 16),
        "lora_dropout": config.number("lora_dropout"),
        "use_dora": config.flag("peft_use_dora") or None,
        "use_rslora": config.flag("peft_use_rslora") or None,
        "init_lora_weights": config.take("peft_init_lora_weights"),
    }
    linear = config.flag("lora_target_linear")
    targets = config.words("lora_target_modules")
    # Every linear layer of the blocks is what an adapter without targets goes to.
    said = {name: value for name, value in fields.items() if value is not None}
    adapt(draft, said, [] if linear else targets, config.words("lora_modules_to_save"))
    if layers := config.take("peft_layers_to_transform"):
        layers = [layers] if isinstance(layers, int) else layers
        opened = draft.stages[0].pop("unfreeze")
        draft.unfreeze(*(f"@blocks[{layer}]" for layer in layers), *(name for name in opened if name != "@blocks"))
    if config.has("unfrozen_parameters"):
        config.take("unfrozen_parameters")
        what = "axolotl freezes every adapter by it, for PEFT puts `base_model.model.` before names; left out"
        config.note("unfrozen_parameters", what)


def _unfrozen(config: Config) -> Iterator[str]:
    """The patterns of what trains, with what is to be said of each."""
    for item in config.items("unfrozen_parameters"):
        for translated in _translated(str(item.value)):
            if translated.remark:
                config.note("unfrozen_parameters", f"`{item.value}`: {translated.remark}", item.place)
            if translated.pattern:
                yield translated.pattern


def _translated(text: str) -> tuple[parameters.Translated, ...]:
    if r"\." in text:
        return (parameters.Translated(None, r"axolotl makes `\\.` of `\.`, which no name matches; left out"),)
    if INSIDE.match(text):
        return (parameters.Translated(None, f"{NEVER}; left out"),)
    rows = ROWS.fullmatch(text)
    try:
        found = parameters.of_regex(re.sub(r"\.(?!\+)", r"\\.", rows[1] if rows else text), "match")
    except ValueError as error:
        return (parameters.Translated(None, str(error)),)
    if rows:
        what = "rows of a tensor can't be frozen by themselves; all of it trains"
        return tuple(parameters.Translated(each.pattern, what) for each in found)
    return found
