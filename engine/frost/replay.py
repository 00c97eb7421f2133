"""A frost line at work: run the frozen prefix once and keep what crosses the line, or replay what was kept.

While a line replays, the frozen modules below it are stood in for by stubs that hand on tensors of the right shape and
compute nothing. A line never changes a weight, never writes to disk, and never replays anything it wasn't fed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from engine import freezing
from engine.errors import RunError
from engine.frost.tracing import Call, arguments, handed_on, without_cache

NEW = object()
"""Source of a stub's output that no argument has the shape of: zeros, of a shape that is worked out."""


@dataclass(frozen=True, eq=False)
class Tap:
    """A place where the frost line crosses the model: one module's output."""

    name: str
    """Name of the module."""
    module: nn.Module
    row: int | None
    """The only index of axis 1 that anything above reads, or None where all of it is read."""
    dtype: torch.dtype
    """What the module computes in."""


class _Enough(Exception):  # noqa: N818
    """Every tap has its tensor: the rest of the forward pass is not needed."""


def capture(model: nn.Module, taps: Sequence[Tap], batch: Mapping[str, Any]) -> list[Tensor]:
    """The tensor at each tap, batch first; eval mode, no gradients, and it stops right after the last tap."""
    taken: dict[int, Tensor] = {}

    def taking(place: int, row: int | None) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = handed_on(output)
            assert tensor is not None
            taken[place] = tensor if row is None else tensor[:, row : row + 1]
            if len(taken) == len(taps):
                raise _Enough
            taken[place] = taken[place].clone()  # code above may write in place

        return hook

    # first of all hooks: what the forward itself returns is what a stub will return, before other hooks see it
    hooks = [tap.module.register_forward_hook(taking(place, tap.row), prepend=True) for place, tap in enumerate(taps)]
    try:
        with freezing.eval_mode(model):
            model(**without_cache(model, batch))
    except _Enough:
        return [taken[place] for place in range(len(taps))]
    finally:
        for hook in hooks:
            hook.remove()
    missed = next(tap.name for place, tap in enumerate(taps) if place not in taken)
    raise RunError(f"`{missed}` did not run in this batch, so its activations can't be kept; set `cache: off`")


class Stub:
    """Stands in for a frozen module's forward: the structure and shapes of its output, and no work."""

    def __init__(self, call: Call, stored: Callable[[torch.Size], Tensor] | None = None):
        self.forward = call.module.forward
        self.stored = stored
        leaves, self.spec = tree_flatten(call.output)
        self.sources = tuple(_source(leaf, call.inputs) for leaf in leaves)
        self._known: dict[Any, list[Any]] = {}

    @property
    def makes_shapes(self) -> bool:
        """Whether it has to work out shapes that no argument has."""
        return NEW in self.sources

    def agrees(self, call: Call) -> bool:
        """Whether the shapes it works out are those of the call it was made from."""
        if not self.makes_shapes:
            return True
        try:
            shapes = _without_work(self.forward, call.args, call.kwargs)
        except Exception:  # foreign code: whatever it raises without real numbers, it can't be stood in for
            return False
        pairs = zip(shapes, tree_leaves(call.output), strict=True)
        return all(isinstance(made, _Shape) and made.shape == leaf.shape for made, leaf in pairs if leaf is not None)

    def like(self, other: Stub) -> bool:
        """Whether both make the same output from the same arguments."""
        return (self.spec, self.sources, self.stored) == (other.spec, other.sources, other.stored)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = arguments(args, kwargs)
        shapes = self._shapes(given, args, kwargs) if self.makes_shapes else [None] * len(self.sources)
        leaves = [
            shape if source is NEW else None if source is None else given[source]
            for source, shape in zip(self.sources, shapes, strict=True)
        ]
        if self.stored is not None:
            leaves[0] = self.stored(leaves[0].shape)
        return tree_unflatten([_zeros(leaf) if isinstance(leaf, _Shape) else leaf for leaf in leaves], self.spec)

    def _shapes(self, given: Mapping[Any, Any], args: Any, kwargs: Any) -> list[Any]:
        """The shapes of the output's leaves; remembered per shape of the arguments."""
        key = tuple((name, _signature(value)) for name, value in given.items())
        if key not in self._known:
            self._known[key] = _without_work(self.forward, args, kwargs)
        return self._known[key]


@dataclass(frozen=True)
class _Shape:
    """What zeros to make."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _source(leaf: Any, inputs: Mapping[Any, Any]) -> Any:
    """Where a stub takes a leaf of its output from: the key of an argument, NEW, or None."""
    if leaf is None:
        return None
    for key, value in inputs.items():
        if value is leaf:
            return key
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == leaf.shape and value.dtype == leaf.dtype:
            return key
    return NEW


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    return value if isinstance(value, (int, float, bool, str, type(None))) else type(value)


def _zeros(shape: _Shape) -> Tensor:
    return torch.zeros(shape.shape, dtype=shape.dtype, device=shape.device)


def _without_work(forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """The shapes of a forward's output, from tensors that have a shape and nothing else."""
    with warnings.catch_warnings(action="ignore"), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        leaves = tree_leaves(forward(*args, **kwargs))
    return [_Shape(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def fit(tensor: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Stored rows in the shape that a batch needs: zeros after the last row, or padding left off.

    Only one axis, and never the batch's, may differ. Rows of zeros are what a model masks out anyway.
    """
    odd = [axis for axis, (has, needs) in enumerate(zip(tensor.shape, shape, strict=False)) if has != needs]
    if not odd and tensor.dim() == len(shape):
        return tensor
    if tensor.dim() != len(shape) or len(odd) != 1 or odd[0] == 0:
        raise RunError(
            f"the kept activations of `{name}` have the shape {tuple(tensor.shape)}, but this batch needs "
            f"{tuple(shape)}; feed the rows of the batch's own examples"
        )
    axis, missing = odd[0], shape[odd[0]] - tensor.shape[odd[0]]
    if missing < 0:
        return tensor.narrow(axis, 0, shape[axis])
    padding = [*tensor.shape[:axis], missing, *tensor.shape[axis + 1 :]]
    return torch.cat([tensor, tensor.new_zeros(padding)], axis)


@dataclass
class Turns:
    """How often a module runs below the line in one forward pass."""

    recomputed: int
    replayed: int = 0


@dataclass(eq=False)
class Line:
    """A frost line: below it everything is frozen and known, above it everything is computed."""

    model: nn.Module
    taps: tuple[Tap, ...]
    live: tuple[str, ...]
    """Parameters below the line that the loss also reads around it; their modules run every time, being cheap."""
    saved: float
    """Share of a forward pass's FLOPs that lies below the line."""
    coarsest: torch.dtype
    """The coarsest type that anything is computed in."""
    early: tuple[nn.Module, ...]
    """Modules that begin before the line is crossed, containers included: they stay in eval mode."""
    prefix: tuple[tuple[str, Tensor], ...]
    """Every frozen parameter and every buffer that what is kept may depend on, in definition order."""
    stubs: dict[nn.Module, Stub] = field(default_factory=dict)
    overrides: dict[nn.Module, int] = field(default_factory=dict)
    """Modules at the line that run every time, because something live is in them; only their output is replaced."""
    shared: dict[nn.Module, Turns] = field(default_factory=dict)
    """Modules that run on both sides of the line, such as the one dropout of a T5 stack."""
    hashed: tuple[tuple[int, ...], bytes] | None = None
    """How often each tensor of `prefix` had been written to, and the hash of them all."""
    _fed: list[Tensor] | None = None
    _fresh: bool = False
    _turns: dict[nn.Module, int] = field(default_factory=dict)
    _replaying: bool = False
    _checkpointing: bool = False

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the modules whose outputs cross the line."""
        return tuple(tap.name for tap in self.taps)

    @property
    def rows(self) -> tuple[int | None, ...]:
        """Per cut: the one row that is kept, or None."""
        return tuple(tap.row for tap in self.taps)

    def capture(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """What crosses the line for a batch: one tensor per cut, batch first, padding included."""
        if self._replaying:
            raise RunError("a frost line can't be captured while it is replayed; leave `replaying()` first")
        return capture(self.model, self.taps, batch)

    def train_mode(self) -> None:
        """Train mode for what runs above the line; what begins below it stays in eval mode.

        Else a frozen BatchNorm would count on, and a layerdrop or SpecAugment in a container would change or skip what
        was kept (44 of 100 batches of a BART with layerdrop 0.3).
        """
        freezing.train_mode(self.model)
        for module in self.early:
            module.training = False

    def feed(self, tensors: Sequence[Tensor]) -> None:
        """What crosses the line in the next forward pass: one tensor per cut; each forward pass needs its own."""
        if len(tensors) != len(self.taps):
            raise RunError(f"this frost line has {len(self.taps)} cuts, but {len(tensors)} tensors were fed")
        self._fed, self._fresh = list(tensors), True

    @cached_property
    def _checkpointed(self) -> list[nn.Module]:
        """Modules that gradient checkpointing can be switched on in."""
        return [module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")]

    @contextmanager
    def replaying(self) -> Iterator[Line]:
        """Inside, `model(**batch)` costs what lies above the line; `feed` comes before every forward pass."""
        if self._replaying:
            raise RunError("this frost line is being replayed already")
        forwards: dict[nn.Module, Callable[..., Any]] = dict(self.stubs)
        forwards |= {module: self._overridden(module, slot) for module, slot in self.overrides.items()}
        forwards |= {module: self._turning(module, turns.replayed) for module, turns in self.shared.items()}
        self._replaying = True
        self._checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self._checkpointed)
        try:
            with self._standing_in(forwards, self._admit):
                yield self
        finally:
            self._replaying, self._fresh, self._fed = False, False, None

    @contextmanager
    def recomputing(self) -> Iterator[Line]:
        """Inside, `model(**batch)` computes everything, and draws at random exactly what a replay draws."""
        forwards = {module: self._turning(module, turns.recomputed) for module, turns in self.shared.items()}
        with self._standing_in(forwards, self._begin):
            yield self

    @contextmanager
    def _standing_in(
        self, forwards: Mapping[nn.Module, Callable[..., Any]], first: Callable[..., Any]
    ) -> Iterator[None]:
        """Other forwards for some modules, and something to call first in each forward pass of the model."""
        before = {module: module.__dict__.get("forward") for module in forwards}
        hook = self.model.register_forward_pre_hook(first, with_kwargs=True)
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            hook.remove()
            for module, forward in before.items():
                module.__dict__.pop("forward")
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _turning(self, module: nn.Module, below: int) -> Callable[..., Any]:
        """The module's forward, in eval mode the first `below` times of a forward pass: then it is below the line."""
        forward = module.forward

        def turn(*args: Any, **kwargs: Any) -> Any:
            self._turns[module] = self._turns.get(module, 0) + 1
            mode = module.training
            module.training = mode and self._turns[module] > below
            try:
                return forward(*args, **kwargs)
            finally:
                module.training = mode

        return turn

    def stored(self, slot: int, shape: torch.Size) -> Tensor:
        """What was fed for a cut, in the shape this forward pass needs."""
        assert self._fed is not None
        tap, tensor = self.taps[slot], self._fed[slot]
        if tap.row is not None and tensor.shape[0] == shape[0]:
            tensor = tensor.expand(-1, shape[1], *tensor.shape[2:])
        tensor = fit(tensor, shape, tap.name)
        if self._checkpointing and torch.is_grad_enabled():
            return freezing.differentiable(tensor.detach())
        return tensor

    def _overridden(self, module: nn.Module, slot: int) -> Callable[..., Any]:
        """The module's forward with the stored tensor in its output; a hook might come after others that look at it."""
        forward = module.forward

        def override(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten(forward(*args, **kwargs))
            return tree_unflatten([self.stored(slot, leaves[0].shape), *leaves[1:]], spec)

        return override

    def _admit(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before each replay: refuse what it can't answer."""
        if refused := next((key for key in UNANSWERABLE if kwargs.get(key)), None):
            raise RunError(f"`{refused}` asks for what lies below the frost line; call the model outside `replaying()`")
        if kwargs.get("past_key_values") is not None:
            raise RunError("generation reads keys and values below the frost line; generate outside `replaying()`")
        if not self._fresh:
            raise RunError("the frost line was fed nothing for this forward pass; call `feed` before each one")
        self._fresh = False
        return self._begin(model, args, kwargs)

    def _begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before each forward pass: everybody's first turn, and no keys and values."""
        self._turns.clear()
        return args, without_cache(model, kwargs)


UNANSWERABLE = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments of a forward pass whose answer needs the modules below the line."""
