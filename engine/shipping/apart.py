"""What a run's adapters learned, apart from the model they are for: a few megabytes to hand on, read by plain PEFT.

adapter/  adapter_config.json  adapter_model.safetensors  weights.safetensors  config.json  README.md

`weights.safetensors` holds whatever else of the model is not as it was: a head, norms, what earlier stages trained or
merged. Several adapters have a folder each. It saves nothing where no adapter is on at the end, and merges nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine import adapters
from engine.learner import Learner
from engine.packages import PREFIX
from engine.prompts import PROMPTS
from engine.recipe import Model

WEIGHTS = "weights.safetensors"


def write(learner: Learner, own: Collection[str], folder: Path) -> None:
    """Write the adapters that are on, and all of the model's `own` tensors that some stage changed, into `folder`."""
    model, described = learner.model, learner.recipe.model
    states = adapters.states(model)
    for name, (config, tensors) in states.items():
        inside = folder / name if len(states) > 1 else folder
        inside.mkdir(parents=True, exist_ok=True)
        save_file({key: _plain(tensor) for key, tensor in tensors.items()}, inside / "adapter_model.safetensors")
        kept = copy(config)
        kept.base_model_name_or_path, kept.revision, kept.inference_mode = described.path, described.revision, True
        if adapters.rewrites(vars(config)):
            kept.init_lora_weights = True  # pyright: ignore  the rewritten weights are in WEIGHTS: once is enough
        if named := getattr(kept, "feedforward_modules", None):  # PEFT's own names of some that have no adapter here
            ends = tuple(f".{name}" for name in named)
            kept.feedforward_modules = {target for target in kept.target_modules if f".{target}".endswith(ends)}  # pyright: ignore
        kept.save_pretrained(str(inside))
    changed = ((learner.moved | learner.trained) & set(own)) | set(_grown(model, described.revision))
    tensors = learner.tensors()
    save_file({name: _plain(tensors[name]) for name in sorted(changed)}, folder / WEIGHTS)
    model.config.save_pretrained(folder)  # pyright: ignore
    (folder / "README.md").write_text(_readme(described, learner.recipe.task.auto, states), encoding="utf-8")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _grown(model: nn.Module, revision: str | None) -> list[str]:
    """Tables of words that have more rows than the model had when it was loaded, so that it can't provide them."""
    had, _ = PreTrainedConfig.get_config_dict(model.name_or_path, revision=revision)  # pyright: ignore
    text = had.get("text_config") or had
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]  # pyright: ignore
    rows = {id(table.weight) for table in tables if table is not None and hasattr(table, "weight")}
    if text.get("vocab_size") in (None, model.config.get_text_config().vocab_size):  # pyright: ignore
        return []
    return [name for name, parameter in model.named_parameters() if id(parameter) in rows]


def _readme(model: Model, auto: str, states: Mapping[str, tuple[PeftConfig, Any]]) -> str:
    """What lies here and the lines of code that put it together again."""
    beside = "The same, merged into one model, lies in `../model`."
    if model.quantization_config is not None:
        beside = "Quantised weights can't take what they learned: `../model` is the model without it."
    if any(config.is_prompt_learning for config, _ in states.values()):
        beside = "Virtual tokens can't be merged: `../model` is the model without them."
    return f"""# Adapters for {model.path}

{", ".join(states)}, trained by Frostline. `{WEIGHTS}` holds what else of the model trained.
{beside} This puts them together again, from the folder above this one:

```python
{code(model, auto, list(states), "adapter")}
```
"""


def code(model: Model, auto: str, names: Sequence[str], folder: str) -> str:
    """The lines of Python that put the adapters in a folder and the model they are for together again.

    Of a model that is quantised, that is the run's own, which holds what was quantised as it was and all that trained.
    """
    if model.quantization_config is not None:
        given = f'model = {auto}.from_pretrained("model")  # the one beside it: quantised as when this was trained'
        loads = ["from peft import PeftModel", f"from transformers import {auto}", "", given]
        return "\n".join([*loads, *_loading(names, folder), "model.eval()"])
    hub = not model.path.startswith((PREFIX, ".", "/"))
    where = "" if hub else "  # the folder that the recipe means by this"
    named = {"revision": model.revision, "gguf_file": model.gguf_file}
    more = "".join(f", {key}={value!r}" for key, value in named.items() if value)
    lines = [
        "from peft import PeftModel",
        "from safetensors.torch import load_file",
        f"from transformers import AutoConfig, {auto}",
        "",
        f"base = {model.path!r}{where}",
        f"model = {auto}.from_pretrained(base, config=AutoConfig.from_pretrained({folder!r}),",
        f'    dtype="{model.dtype}", ignore_mismatched_sizes=True{more})',
        f"model.load_state_dict(load_file({f'{folder}/{WEIGHTS}'!r}), strict=False)",
        *_loading(names, folder),
        "model.eval()",
    ]
    return "\n".join(lines)


def _loading(names: Sequence[str], folder: str) -> list[str]:
    if len(names) == 1:
        return [f"model = PeftModel.from_pretrained(model, {folder!r})"]
    inside = [name for name in names if name.rstrip("0123456789") not in PROMPTS]
    around = [f"model = PeftModel.from_pretrained(model, '{folder}/{name}')" for name in names if name not in inside]
    return [
        f"for name in {inside!r}:",
        f'    model = PeftModel.from_pretrained(model, f"{folder}/{{name}}", adapter_name=name).base_model.model',
        "for layer in model.modules():  # all at once: PEFT by itself has only the last one take part",
        '    if hasattr(layer, "adapter_layer_names"):',
        "        held = {name for part in layer.adapter_layer_names for name in getattr(layer, part)}",
        "        layer.set_adapter(sorted(held))",
        *around,
    ]
