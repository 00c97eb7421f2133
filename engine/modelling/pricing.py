"""What each module of a skeleton takes for an example of any length: FLOPs, what comes in and goes out, what is kept.

Two lengths tell of all others: what a module takes is a line or a parabola in them. Nothing is run on real numbers, and
what can't be read off a skeleton is left at nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from engine.freezing import all_trainable, eval_mode, only_trainable
from engine.frost.tracing import Flops, without_cache
from engine.outline import Amount, Price, below

Inputs = dict[str, Tensor]
FIELDS = ("work", "takes", "gives", "keeps", "passes", "attention")


@dataclass
class _Reading:
    """One forward pass: module -> what it took."""

    work: dict[str, float] = field(default_factory=dict)
    takes: dict[str, float] = field(default_factory=dict)
    gives: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)


def prices(
    model: nn.Module, sample: Callable[[int], Inputs], tokens: int, blocks: tuple[str, ...], first: set[str]
) -> dict[str, Price]:
    """Module -> its price; empty where the model can't run on its device without numbers.

    `sample` makes an example of some length, `tokens` is the longest to ask for, 0 where examples have no length.
    `first` names the parameters that gradients have to reach to pass through everything else.
    """
    lengths = (tokens, tokens // 2) if tokens > 3 else (tokens,)
    with suppress(Exception), eval_mode(model), torch.enable_grad():  # a model is foreign code: it may raise anything
        _drop_out(model, blocks)
        read = [_both(model, sample(length), first) for length in lengths]
        names = [name for name, _ in model.named_modules()]
        return {
            name: Price(*(_fit([each[part].get(name, 0.0) for each in read], lengths) for part in FIELDS))
            for name in names
        }
    return {}


def _both(model: nn.Module, inputs: Inputs, first: set[str]) -> dict[str, dict[str, float]]:
    """One pass with everything trainable, and one in which gradients only pass through."""
    inputs = _with_labels(model, inputs)
    with all_trainable(model):
        whole = _read(model, inputs)
    with only_trainable(model, first):
        through = _read(model, inputs)
    return {
        "work": whole.work,
        "takes": whole.takes,
        "gives": whole.gives,
        "keeps": whole.kept,
        "passes": through.kept,
        "attention": whole.attention,
    }


def _fit(values: list[float], lengths: tuple[int, ...]) -> Amount:
    """The amount that has these values at a length and at half of it."""
    if len(values) == 1 or values[0] == values[1]:
        return Amount(fixed=values[0])
    length, (whole, half) = lengths[0], values
    square = max(0.0, 2 * whole - 4 * half) / length**2
    return Amount(linear=whole / length - square * length, square=square)


def _drop_out(model: nn.Module, blocks: tuple[str, ...]) -> None:
    """Train mode for whatever drops out, whose masks are kept; not for what would count, mask or skip blocks."""
    for name, module in model.named_modules():
        holds = not name or any(below(block, name) and block != name for block in blocks)
        module.training = not holds and not isinstance(module, _BatchNorm)


def _with_labels(model: nn.Module, inputs: Inputs) -> Inputs:
    """The example with a label, or one a token, where the model then has a loss: over a vocabulary that is large."""
    if "labels" not in signature(model.forward).parameters:
        return inputs
    with suppress(Exception), torch.no_grad():
        logits = model(**inputs).logits
        shape = logits.shape[:-1] if logits.dim() in (2, 3) else ()
        labelled = {**inputs, "labels": torch.zeros(shape, dtype=torch.long, device=logits.device)}
        if model(**labelled).loss is not None:
            return labelled
    return inputs


def _read(model: nn.Module, inputs: Mapping[str, Tensor]) -> _Reading:
    reading, alive = _Reading(), []
    seen = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}

    with _stack(model, reading) as stack, _Attention() as attention:

        def keep(tensor: Tensor) -> Tensor:
            if (storage := _storage(tensor)) not in seen:
                seen.add(storage)
                alive.append(tensor)  # or another tensor might come to lie in its place
                kept = reading.kept if attention.given is None or storage in attention.given else reading.attention
                kept[stack[-1]] = kept.get(stack[-1], 0.0) + tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**without_cache(model, inputs))
    return reading


class _Attention(TorchFunctionMode):
    """Knows whether torch's own attention is being computed: what it makes on its way depends on the device."""

    given: set[int] | None = None
    """Storages of its arguments while it is computed."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.given = None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _stack(model: nn.Module, reading: _Reading) -> Iterator[list[str]]:
    """The names of the modules that are running, innermost last, while FLOPs and sizes are read."""
    names, spent, hooks, flops = [""], [[0.0, 0.0]], [], Flops()

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            names.append(name)
            spent.append([flops.total, 0.0])
            reading.takes.setdefault(name, _elements((args, kwargs)))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            names.pop()
            start, children = spent.pop()
            whole = flops.total - start
            spent[-1][1] += whole
            reading.work[name] = reading.work.get(name, 0.0) + whole - children
            reading.gives.setdefault(name, _elements(output))

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(leave(name)))
    try:
        with flops:
            yield names
    finally:
        for hook in hooks:
            hook.remove()


def _elements(values: Any) -> float:
    """Elements of the first float tensor, or of the first one at all."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return float(next(iter((*floats, *tensors)), torch.empty(0)).numel())
