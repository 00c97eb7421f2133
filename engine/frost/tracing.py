"""One forward pass, watched: which module ran when, at what price, and which parameters the loss depends on.

A trace is evidence, not an opinion: the autograd graph says what reaches the loss, hooks say in which order
modules ran. It never decides where to cut, never changes a weight, and leaves flags, modes and hooks as it found them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from inspect import signature
from itertools import count
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine import freezing


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention while it is active.

    torch's own `FlopCounterMode` also tracks modules through global hooks, which shared modules confuse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(function, "overloadpacket", None))
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=output))
        return output


@dataclass(eq=False)
class Call:
    """One call of one module."""

    name: str
    module: nn.Module
    start: int
    """Tick at which it began; ticks order the beginnings and ends of all calls."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    price_before: int
    end: int = 0
    price_after: int = 0
    output: Any = None
    nodes: tuple[Node | None, ...] = ()
    """Autograd node of each leaf of the output, taken at once: later code may write in place."""
    children: list[Call] = field(default_factory=list)

    @cached_property
    def inputs(self) -> dict[Any, Any]:
        """Its arguments, by position or keyword; see `arguments`."""
        return arguments(self.args, self.kwargs)

    @property
    def price(self) -> int:
        """Forward FLOPs, its children's included."""
        return self.price_after - self.price_before

    @property
    def tensor(self) -> Tensor | None:
        """The one tensor it hands on."""
        return handed_on(self.output)

    @property
    def node(self) -> Node | None:
        """Autograd node of `tensor`."""
        return self.nodes[0] if self.tensor is not None and self.nodes else None


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """Arguments by position or keyword; the items of a tuple or list by that and their index."""
    found: dict[Any, Any] = {}
    for key, value in (*enumerate(args), *kwargs.items()):
        if type(value) in (tuple, list):
            found |= {(key, index): item for index, item in enumerate(value)}
        else:
            found[key] = value
    return found


def handed_on(output: Any) -> Tensor | None:
    """The tensor a module's output stands for: itself, or the first item of a plain tuple, list or model output."""
    if type(output) in (tuple, list) and output:
        output = output[0]
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    return output if isinstance(output, Tensor) else None


def without_cache(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, and the request for no keys and values: training needs none, and a trace would fill them twice.

    Whoever asks for them all the same, as generation does, gets them.
    """
    forward = model.forward
    takes = _keeps_keys(forward.__func__) if isinstance(forward, MethodType) else "use_cache" in _parameters(forward)
    return {"use_cache": False, **batch} if takes else dict(batch)


def _parameters(forward: Callable[..., Any]) -> Mapping[str, Any]:
    return signature(forward).parameters


@lru_cache  # of a class's forward alone, for it is asked at each pass, and what belongs to a model must not be held
def _keeps_keys(forward: Callable[..., Any]) -> bool:
    return "use_cache" in _parameters(forward)


@contextmanager
def no_keys(model: nn.Module) -> Iterator[None]:
    """Inside, no forward pass makes keys and values unless it is asked to."""
    hook = model.register_forward_pre_hook(
        lambda model, args, kwargs: (args, without_cache(model, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def loss_of(output: Any, mask: Tensor | None = None) -> Tensor:
    """What training descends: the model's loss, else the mean square of its first differentiable output.

    Where that output has something for every token, what stands on padding by the attention mask is left out.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None)
    squares = first.float().square()
    padded = mask is not None and squares.shape[: mask.dim()] == mask.shape
    return (squares[mask.bool()] if padded else squares).mean()


@dataclass(eq=False)
class Reach:
    """What an autograd graph holds on the way down from some nodes."""

    leaves: set[int]
    """`id` of every parameter or input reached."""
    nodes: set[Node]
    """Every node passed."""
    users: dict[Node, list[Node]]
    """Of each node the walk stopped at: the nodes that read its output."""


def reach(roots: Iterable[Node], stops: Collection[Node] = ()) -> Reach:
    """Walk the autograd graph from `roots` down to its leaves, without passing a node of `stops`."""
    found = Reach(set(), set(), {stop: [] for stop in stops})
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in found.nodes:
            continue
        found.nodes.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.leaves.add(id(leaf))
        for below, _ in node.next_functions:
            if below in found.users:
                found.users[below].append(node)
            elif below is not None:
                waiting.append(below)
    return found


@dataclass(eq=False)
class Trace:
    """A forward pass as it happened, its autograd graph still alive."""

    model: nn.Module
    calls: list[Call]
    """In order of completion; the last is the model itself."""
    loss: Tensor
    examples: int
    """Number of examples in the batch."""

    @property
    def top(self) -> Call:
        return self.calls[-1]

    @cached_property
    def turns(self) -> dict[nn.Module, list[Call]]:
        """Module -> its calls, in order of completion; modules that were never called are missing."""
        turns: dict[nn.Module, list[Call]] = {}
        for call in self.calls:
            turns.setdefault(call.module, []).append(call)
        return turns

    def turns_at(self, name: str) -> list[Call]:
        """Calls of the module `name`, or of its nearest ancestor that is called: that one reads its parameters."""
        while (module := self.model.get_submodule(name)) not in self.turns:
            name = name.rpartition(".")[0]
        return self.turns[module]


class _Recorder:
    """The hooks of a trace."""

    def __init__(self, flops: Flops):
        self.flops = flops
        self.ticks: Iterator[int] = count()
        self.open: list[Call] = []
        self.calls: list[Call] = []

    def begins(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(name, module, next(self.ticks), args, kwargs, self.flops.total)
            if self.open:
                self.open[-1].children.append(call)
            self.open.append(call)

        return hook

    def ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.open.pop()
        made = handed_on(output)
        if isinstance(module, nn.Linear) and made is not None and self.flops.total == call.price_before:
            # A quantised product is an operation of another library, which no formula counts.
            self.flops.total += 2 * made.numel() * module.in_features
        call.end, call.price_after, call.output = next(self.ticks), self.flops.total, output
        call.nodes = tuple(leaf.grad_fn if isinstance(leaf, Tensor) else None for leaf in tree_leaves(output))
        self.calls.append(call)


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Recorder]:
    recorder = _Recorder(Flops())
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(recorder.begins(name), with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.ends, with_kwargs=True, prepend=True))
    try:
        with recorder.flops:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    """Run `model(**batch)` once in eval mode, every float parameter and input differentiable, and watch.

    Two short examples are enough; the batch itself is not touched.
    """
    batch = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    with freezing.eval_mode(model), torch.enable_grad(), freezing.all_trainable(model, tensors):
        with _recording(model) as recorder:
            output = model(**without_cache(model, batch))
        return Trace(model, recorder.calls, loss_of(output, batch.get("attention_mask")), tensors[0].shape[0])
