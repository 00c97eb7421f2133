"""Model -> outline: names and sizes of its modules, their order and price in a forward pass, and its parts by role.

Works on the meta device, where a forward pass costs nothing; where a model can't run there, the outline says so and
goes by definition order and sizes instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine import prompts
from engine.freezing import bare, eval_mode
from engine.modelling.pricing import prices
from engine.outline import Module, Outline, Parameter, below

TOKENS = 128
"""Length of the text that a step's price is measured on."""


def outline(model: nn.Module, random: tuple[str, ...] = (), unadapted: Outline | None = None) -> Outline:
    """The outline of a model; `unadapted` is its outline before adapters, whose order and prices still hold.

    It is read once for models of the same make: a sweep has dozens of runs of one.
    """
    if unadapted is not None:
        return replace(unadapted, parameters=tuple(_parameters(model, {m.name for m in unadapted.modules})))
    make = _make(model)
    if make not in _known:
        _known.clear()
        _known[make] = _read(model)
    return replace(_known[make], random=random)


_known: dict[str, Outline] = {}
"""The make of the model that was read last -> its outline."""


def _make(model: nn.Module) -> str:
    """All that an outline follows from, in one text: config, modules and the shapes of what they hold."""
    config = getattr(model, "config", None)
    settings = config.to_dict() | {"attention": config._attn_implementation} if config is not None else {}
    modules = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}") for name, module in model.named_modules()
    ]
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype), tensor.device.type) for name, tensor in held]
    tied = len({id(tensor) for _, tensor in held})
    return repr((settings, modules, tensors, tied))


def _read(model: nn.Module) -> Outline:
    price, order, working = _trace(model)
    modules = tuple(
        Module(name, type(module).__name__, order.get(name), price.get(name, 0.0))
        for name, module in model.named_modules()
        if name
    )
    if not order:
        modules = tuple(replace(module, flops=_guess(model.get_submodule(module.name))) for module in modules)
    stack = tuple(blocks(model))
    head = tuple(_head(model, stack))
    embeddings = tuple(_embeddings(model, modules, stack, head))
    tokens = _tokens(model)
    if working:
        first = _first(model, order, embeddings)
        found = prices(model, lambda length: working(sample(model, length)), tokens, stack, first)
        modules = tuple(replace(module, price=found.get(module.name, module.price)) for module in modules)
    return Outline(
        architecture=type(model).__name__,
        modules=modules,
        parameters=tuple(_parameters(model, {module.name for module in modules})),
        buffers=tuple(name for name, _ in model.named_buffers()),
        blocks=stack,
        head=head,
        embeddings=embeddings,
        tokens=tokens,
        measured=bool(order),
    )


def _parameters(model: nn.Module, modules: set[str]) -> Iterator[Parameter]:
    """Every parameter once; an adapter's belongs to the innermost module of the bare model around it.

    A prompt's belong to the word embeddings, which its virtual tokens come beside or after.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    aliases: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(bare(name))
    tuned = {bare(name): layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, tensor in model.named_parameters():
        first, *others = dict.fromkeys(aliases[id(tensor)])
        module = first.rpartition(".")[0]
        adapter = None
        if below(first, prompts.HELD) and (wrap := prompts.of(model)) is not None:
            words = wrap.word_embeddings
            module = next(name for name, each in model.named_modules() if each is words)
            adapter = first.split(".")[1]
        elif module not in modules and module:
            module = next(layer for layer in tuned if below(module, layer))
            adapter = next(
                part for part in bare(name)[len(module) + 1 :].split(".") if part in _adapters_of(tuned[module])
            )
        yield Parameter(first, module, tuple(tensor.shape), adapter, tuple(others))


def _adapters_of(layer: nn.Module) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}  # pyright: ignore


def _trace(model: nn.Module) -> tuple[dict[str, float], dict[str, int], Variant | None]:
    """FLOPs that each module spends itself, per example, the rank of its first call, and what made the model run.

    They are empty and None where it can't run.
    """
    order: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    spent: dict[str, float] = {}
    stack: list[list[float]] = []

    def enter(name: str) -> None:
        order.setdefault(name, len(order))
        stack.append([counter.get_total_flops(), 0.0])

    def leave(name: str) -> None:
        start, children = stack.pop()
        total = counter.get_total_flops() - start
        spent[name] = spent.get(name, 0.0) + total - children
        if stack:
            stack[-1][1] += total

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _m, _a, name=name: enter(name)))
        hooks.append(module.register_forward_hook(lambda _m, _a, _o, name=name: leave(name)))
    try:
        for variant in VARIANTS:
            order.clear(), spent.clear(), stack.clear()
            with suppress(Exception), eval_mode(model), counter:  # a model is foreign code: it may raise anything here
                model(**variant(sample(model)))
                return spent, order, variant
    finally:
        for hook in hooks:
            hook.remove()
    return {}, {}, None


Variant = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _masked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def _squarely_masked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
    return {**inputs, "attention_mask": torch.zeros(1, 1, length, length, device=device)}


VARIANTS: tuple[Variant, ...] = (
    lambda inputs: inputs,
    _masked,
    _squarely_masked,  # a mask from token to token is taken as it is, where another is looked into
    lambda inputs: {name: value[:, None] for name, value in inputs.items()},  # several choices, of which this is one
)
"""What to try a model with: some can't do without a mask, others look into it, and a skeleton has no values."""


def _first(model: nn.Module, order: dict[str, int], embeddings: tuple[str, ...]) -> set[str]:
    """Parameters that gradients have to reach to pass through all else: those of the embeddings, or the first."""
    names = [name for name, _ in model.named_parameters() if any(below(name, part) for part in embeddings)]
    if not names:
        owners = [name for name, module in model.named_modules() if name in order and [*module.parameters(False)]]
        names = [name for name, _ in model.named_parameters() if below(name, min(owners, key=lambda o: order[o]))]
    return set(names)


def _tokens(model: nn.Module) -> int:
    """Tokens of the text that the model is tried with; 0 where it takes no text."""
    inputs = sample(model)
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else 0


def pictured(config: Any) -> Any:
    """The side, or the height and the width, of the pictures that a config is for; None where it names none."""
    return getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)


def sample(model: nn.Module, length: int = TOKENS) -> dict[str, torch.Tensor]:
    """One example of zeros on the model's device: a text of `length` tokens, a picture, or some seconds of sound."""
    config, device = model.config, next(model.parameters()).device
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        # A network of convolutions takes pictures of any size, so its config names none.
        size = pictured(config) or getattr(model, "sides", (224, 224))
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), *sides, device=device)}
    if name == "input_features":
        return {name: torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, device=device)}
    if name == "input_values" and hasattr(config, "num_mel_bins"):  # a spectrogram, as AST takes it
        return {name: torch.zeros(1, config.max_length, config.num_mel_bins, device=device)}
    if name == "input_values":
        return {name: torch.zeros(1, 16_000, device=device)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # XLNet says -1 for no limit; RoBERTa's first two positions are none.
    positions = (getattr(text, "max_position_embeddings", None) or 0) - 2
    tokens = torch.zeros(1, min(length, positions) if positions > 0 else length, dtype=torch.long, device=device)
    batch = {"input_ids": tokens}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens
    return batch


def _guess(module: nn.Module) -> float:
    """Two FLOPs for each weight and token, where nothing could be measured."""
    return sum(2.0 * TOKENS * p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)


def blocks(model: nn.Module) -> Iterator[str]:
    """The repeated blocks, in forward order: the items of the outermost lists of alike modules that weigh most."""
    stacks: list[tuple[str, nn.Module, int]] = []
    for name, module in model.named_modules():
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        weight = sum(parameter.numel() for parameter in module.parameters())
        inside = any(below(name, outer) for outer, _, _ in stacks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and alike and weight and not inside:
            stacks.append((name, module, weight))
    heaviest = max((weight for _, _, weight in stacks), default=0)
    for name, module, weight in stacks:
        if weight * 10 >= heaviest:
            yield from (f"{name}.{child}" for child, _ in module.named_children())


def _head(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[str]:
    """What a task adds: everything outside the base model, and a pooler on top of its blocks."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if base is None and type(model).__name__.endswith("Model"):  # a base model by itself, such as a `BertModel`
        yield from (name for name, child in model.named_children() if name == "pooler" and [*child.parameters()])
        return
    for name, child in model.named_children():
        if child is _entrance(model):
            continue
        if (
            child is not base
            and not any(below(block, name) for block in blocks)
            and any(True for _ in child.parameters())
        ):
            yield name
    if base is not None:
        for name, child in base.named_children():
            if name == "pooler" and any(True for _ in child.parameters()):
                yield f"{prefix}.{name}"


def _entrance(model: nn.Module) -> nn.Module | None:
    """The module that inputs go through first, where the model knows one."""
    with suppress(RuntimeError):  # what transformers raises for models that take no tokens is a kind of it
        return model.get_input_embeddings()  # pyright: ignore
    return None


def _embeddings(
    model: nn.Module, modules: tuple[Module, ...], blocks: tuple[str, ...], head: tuple[str, ...]
) -> Iterator[str]:
    """The outermost modules with weights that come before the first block."""
    rank = {module.name: index if module.order is None else module.order for index, module in enumerate(modules)}
    if not blocks:
        return
    first = min(rank[block] for block in blocks)
    entrance = _entrance(model)
    taken: list[str] = []
    for name in (module.name for module in modules):
        holds_blocks = any(below(block, name) for block in blocks)
        inside = any(below(name, other) for other in (*taken, *blocks, *head))
        weighs = any(True for _ in model.get_submodule(name).parameters())
        early = rank[name] < first or model.get_submodule(name) is entrance
        if weighs and not holds_blocks and not inside and early:
            taken.append(name)
            yield name
