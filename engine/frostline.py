"""Finds the frost line of a model: the deepest place below which everything is frozen and nothing is needed again.

One traced forward pass is the only witness: autograd says what reaches the loss around a cut, so residuals,
cross-attention, skips and tied weights need no special case. It knows no architecture by name, and refuses where it
would have to guess.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from engine import prompts
from engine.freezing import eval_mode, parameters
from engine.frost.replay import Line, Stub, Tap, Turns
from engine.frost.tracing import Call, Reach, Trace, loss_of, reach, trace

CHEAP = 0.02
"""Live modules below the line may cost this share of what it saves: position biases, look-ups."""
MOST_CUTS = 6
DEEPER = 0.1
"""Several cuts must save this share of a forward pass more than one cut does."""


@dataclass(frozen=True)
class Refusal:
    """Why there is no frost line."""

    reason: str
    """One sentence for the user."""


@dataclass(frozen=True)
class Difference:
    """How far a replay is from the full forward pass, relative to the loss and to the largest gradient."""

    loss: float
    gradient: float

    def within(self, tolerance: float = 1e-5) -> bool:
        """Whether the replay can be trusted; 1e-5 is right for float32, stored as such."""
        return self.loss <= tolerance and self.gradient <= tolerance


def find(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    trainable: Collection[str] | None = None,
    least_saving: float = 0.1,
) -> Line | Refusal:
    """The frost line of `model` as it stands, or why it has none.

    `batch` is traced once in eval mode: two short examples, labels included. `trainable` names the parameters that
    train, for a stage yet to come; now it is those that require gradients. A line that saves less than the share
    `least_saving` of a forward pass is refused.
    """
    training = {
        id(parameter): name
        for name, parameter in parameters(model).items()
        if (parameter.requires_grad if trainable is None else name in trainable)
    }
    if reason := _no_question(model, batch, training):
        return Refusal(reason)
    try:
        seen = trace(model, batch)
    except (RuntimeError, StopIteration) as error:
        return Refusal(f"the model can't be traced: {str(error).splitlines()[0] if str(error) else 'nothing to train'}")
    search = _Search(seen, training)
    cuts = search.cuts()
    if not cuts:
        return Refusal(search.why_none())
    if (saved := search.gain(cuts) / max(seen.top.price, 1)) < least_saving:
        return Refusal(f"`{search.first[1]}` trains, so only {saved:.0%} of the work lies below the frost line")
    return _line(search, cuts, saved)


def _no_question(model: nn.Module, batch: Mapping[str, Any], training: Mapping[int, str]) -> str:
    """Why there is no need to look, or the empty string."""
    if not training:
        return "nothing trains"
    if len(training) == sum(1 for _ in model.parameters()):
        return "everything trains"
    if prompts.of(model) is not None:
        return "virtual tokens train, and they change every layer"
    if batch.get("past_key_values") is not None:
        return "the batch brings keys and values of an earlier forward pass, which lie below any frost line"
    config = getattr(model, "config", None)
    for key in ("output_hidden_states", "output_attentions"):
        if getattr(config, key, False):
            return f"the model's config sets `{key}`, which reads every layer below the frost line"
    return ""


class _Search:
    """The choice of cuts in one trace."""

    def __init__(self, seen: Trace, training: Mapping[int, str]):
        self.trace = seen
        self.training = training
        self.owned = {module: {id(p) for p in module.parameters(recurse=False)} for module in seen.model.modules()}
        self.held = {module: {id(p) for p in module.parameters()} for module in seen.turns}

    @cached_property
    def first(self) -> tuple[Call, str]:
        """The first call that needs something trainable, and the name of the module that owns it."""
        starts = [
            (min(self.trace.turns_at(name), key=lambda call: call.start), name)
            for name, module in self.trace.model.named_modules()
            if self.owned[module] & self.training.keys()
        ]
        return min(starts, key=lambda start: start[0].start)

    @cached_property
    def candidates(self) -> list[Call]:
        """Calls whose output could be kept, the latest first, one for each tensor that is handed on.

        Of several, the outermost: it stands in for most. A container whose output is a mapping hands on more than one
        tensor, so it comes into question only where nothing inside does, and then the innermost.
        """
        alike: dict[Node | None, list[Call]] = {}
        for call in filter(self._could_be_kept, self.trace.calls):
            alike.setdefault(call.node, []).append(call)
        plain = {node: [c for c in calls if not isinstance(c.output, Mapping)] for node, calls in alike.items()}
        chosen = [plain[node][-1] if plain[node] else calls[0] for node, calls in alike.items()]
        return sorted(chosen, key=lambda call: -call.end)

    def _could_be_kept(self, call: Call) -> bool:
        tensor = call.tensor
        return (
            call.end < self.first[0].start
            and tensor is not None
            and call.node is not None
            and tensor.dim() > 1
            and tensor.shape[0] == self.trace.examples
            and len(self.trace.turns[call.module]) == 1
            and not self.held[call.module] & self.training.keys()
            and not any(value is tensor for value in call.inputs.values())  # a pass-through made nothing
            and "drop" not in type(call.module).__name__.lower()  # dropout before a head belongs to the head
        )

    def gain(self, cuts: Sequence[Call]) -> int:
        """FLOPs done when the last cut is reached."""
        return max(call.price_after for call in cuts)

    def around(self, cuts: Sequence[Call]) -> Reach:
        """What the loss depends on without passing a cut."""
        loss = self.trace.loss.grad_fn
        assert loss is not None
        return reach([loss], {call.node for call in cuts if call.node is not None})

    def leaks(self, cuts: Sequence[Call], found: Reach) -> set[int]:
        """Parameters of modules that are done below the line, yet reach the loss around it."""
        return found.leaves & set().union(*(self.owned[module] for module in self._done(cuts)))

    def _done(self, cuts: Sequence[Call]) -> list[nn.Module]:
        end = max(call.end for call in cuts)
        return [module for module, turns in self.trace.turns.items() if max(call.end for call in turns) <= end]

    def cost(self, cuts: Sequence[Call]) -> int:
        """FLOPs below the line that still have to be done every time."""
        leaks = self.leaks(cuts, self.around(cuts))
        modules = [module for module in self._done(cuts) if self.owned[module] & leaks]
        return sum(call.price for module in modules for call in self.trace.turns[module])

    def cheap(self, cuts: Sequence[Call]) -> bool:
        return self.cost(cuts) <= CHEAP * self.gain(cuts)

    def cuts(self) -> list[Call]:
        """The deepest cut, or several where they go much deeper: encoder and decoder, two towers, feature maps."""
        best = next(([call] for call in self.candidates if self.cheap([call])), [])
        worth = DEEPER * self.trace.top.price
        for call in self.candidates[:8]:
            if best and self.gain([call]) - self.gain(best) < worth:
                break
            if more := self._grown([call]):
                best = more
                break
        return sorted(best, key=lambda call: call.end) if self._frozen_below(best) else []

    def _grown(self, cuts: list[Call]) -> list[Call]:
        """`cuts` and the latest earlier ones that stop what leaks around them; empty where six are not enough."""
        cost = self.cost(cuts)
        while cost > CHEAP * self.gain(cuts):
            earlier = (call for call in self.candidates if call.end < cuts[0].end)
            more = next((call for call in earlier if self.cost([call, *cuts]) < 0.95 * cost), None)
            if more is None or len(cuts) == MOST_CUTS:
                return []
            cuts = [more, *cuts]
            cost = self.cost(cuts)
        return cuts

    def _frozen_below(self, cuts: Sequence[Call]) -> bool:
        """Whether nothing that trains reaches a cut: exact where a weight is read before its own module runs."""
        return not reach([call.node for call in cuts if call.node is not None]).leaves & self.training.keys()

    def why_none(self) -> str:
        """The reason for the user why no cut was found."""
        call, name = self.first
        done = call.price_before / max(self.trace.top.price, 1)
        weights = self.owned[self.trace.model.get_submodule(name)] & self.training.keys()
        tied = [place for place, module in self.trace.model.named_modules() if self.owned[module] & weights]
        if len(tied) > 1:
            return f"the trainable `{tied[-1]}` is tied to `{tied[0]}`, so nothing below it is frozen"
        if turns := len(self.trace.turns_at(name)) - 1:
            return f"`{name}` trains and runs {turns + 1} times, the first time after {done:.0%} of the work"
        if done < DEEPER:
            return f"`{name}` trains and runs after only {done:.0%} of the work"
        return f"no few tensors below `{name}` hold all that the rest of the model needs"

    def row(self, cut: Call, found: Reach) -> int | None:
        """The one index of axis 1 that everything above reads, if it is so."""
        assert cut.node is not None
        assert cut.tensor is not None
        reads = {
            (getattr(node, "_saved_dim", None), getattr(node, "_saved_index", None))
            if node.name().startswith("SelectBackward")
            else None
            for node in found.users[cut.node]
        }
        (only,) = reads if len(reads) == 1 else (None,)
        return 0 if only == (1, 0) and cut.tensor.dim() > 2 else None


def _line(search: _Search, cuts: list[Call], saved: float) -> Line:
    found = search.around(cuts)
    leaks = search.leaks(cuts, found)
    names = {id(parameter): name for name, parameter in search.trace.model.named_parameters()}
    taps = [
        Tap(call.name, call.module, search.row(call, found), call.tensor.dtype)  # pyright: ignore
        for call in cuts
    ]
    line = Line(
        model=search.trace.model,
        taps=tuple(taps),
        live=tuple(sorted(names[leak] for leak in leaks)),
        saved=saved,
        coarsest=_coarsest(search.trace),
        early=tuple(_early(search.trace, cuts[-1].end)),
        prefix=tuple(_prefix(search, cuts[-1].end)),
        shared=_shared(search.trace, cuts[-1].end),
    )
    _StandIns(search, cuts, leaks, found, line).place(search.trace.top)
    return line


def _coarsest(seen: Trace) -> torch.dtype:
    """The coarsest type of any module's output, which autocast makes of the weights' own, or of those themselves."""
    types = {call.tensor.dtype for call in seen.calls if call.tensor is not None and call.tensor.is_floating_point()}
    types |= {weight.dtype for weight in seen.model.parameters() if weight.is_floating_point()}
    return max(types, key=lambda dtype: torch.finfo(dtype).eps)


def _early(seen: Trace, end: int) -> list[nn.Module]:
    """Modules that begin before the line, but for those that run on both sides of it."""
    shared = _shared(seen, end)
    return [m for m, turns in seen.turns.items() if m not in shared and min(call.start for call in turns) < end]


def _shared(seen: Trace, end: int) -> dict[nn.Module, Turns]:
    """Childless modules that run below the line and above it: how often they run below."""
    below = {module: sum(call.end <= end for call in turns) for module, turns in seen.turns.items()}
    return {
        module: Turns(recomputed=below[module])
        for module, turns in seen.turns.items()
        if 0 < below[module] < len(turns) and not any(True for _ in module.children())
    }


def _prefix(search: _Search, end: int) -> list[tuple[str, Tensor]]:
    """Frozen parameters and buffers of whatever begins before the line."""
    model, prefix = search.trace.model, {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        begins = min(call.start for call in search.trace.turns_at(name.rpartition(".")[0]))
        if begins < end and id(tensor) not in search.training:
            prefix.setdefault(id(tensor), (name, tensor))
    return list(prefix.values())


class _StandIns:
    """Decides, call by call, what stands in for what while a line replays."""

    def __init__(self, search: _Search, cuts: list[Call], leaks: set[int], found: Reach, line: Line):
        self.search, self.cuts, self.leaks, self.found, self.line = search, cuts, leaks, found, line
        self.end = cuts[-1].end
        self.refused: set[nn.Module] = set()

    def place(self, call: Call) -> None:
        """Stub the call, or else look inside it."""
        slot = next((slot for slot, cut in enumerate(self.cuts) if cut is call), None)
        whole = self._frozen_and_done(call) and self._plain(call, slot)
        if slot is not None and whole and (stub := Stub(call, partial(self.line.stored, slot))).agrees(call):
            self.line.stubs[call.module] = stub
        elif slot is not None:
            self.line.overrides[call.module] = slot
            self._inside(call)
        elif not (whole and not self._holds_cut(call) and self._stub(call)):
            self._inside(call)

    def _inside(self, call: Call) -> None:
        if call.module in self.line.shared and call.end <= self.end:
            self.line.shared[call.module].replayed += 1
        if call.start < self.end:
            for child in call.children:
                self.place(child)

    def _stub(self, call: Call) -> bool:
        """Stub a call below the line, unless its module is also called in another manner."""
        stub, other = Stub(call), self.line.stubs.get(call.module)
        if call.module in self.refused or (other is not None and not stub.like(other)):
            self.refused.add(call.module)
            self.line.stubs.pop(call.module, None)
            return False
        if stub.makes_shapes and not (call.price and stub.agrees(call)):
            return False  # a look-up is cheaper than working its shape out
        self.line.stubs[call.module] = stub
        return True

    def _frozen_and_done(self, call: Call) -> bool:
        held = self.search.held[call.module]
        done = all(turn.end <= self.end for turn in self.search.trace.turns[call.module])
        return done and bool(held) and not held & self.leaks

    def _holds_cut(self, call: Call) -> bool:
        return any(call.start < cut.start and cut.end < call.end for cut in self.cuts)

    def _plain(self, call: Call, slot: int | None) -> bool:
        """Whether the output is tensors in plain tuples and lists, none of which the loss reads around the line."""
        if call.tensor is None or not _tensors_only(call.output):
            return False
        given = [id(value) for value in call.inputs.values()]
        leaves = tree_leaves(call.output)
        known = [slot is not None, *[False] * (len(leaves) - 1)]
        known = [this or leaf is None or id(leaf) in given for this, leaf in zip(known, leaves, strict=True)]
        unread = [node is not None and node not in self.found.nodes for node in call.nodes]
        return all(this or that for this, that in zip(known, unread, strict=True))


def _tensors_only(output: Any) -> bool:
    if type(output) in (tuple, list):
        return all(map(_tensors_only, output))
    if isinstance(output, Mapping):
        return all(map(_tensors_only, output.values()))
    return output is None or isinstance(output, Tensor)


def verify(model: nn.Module, line: Line, batch: Mapping[str, Any], tensors: Sequence[Tensor]) -> Difference:
    """Loss and gradients of a replay against the full forward pass, in eval mode; nothing is left in `.grad`."""
    full = _loss_and_gradients(model, batch)
    with line.replaying():
        line.feed(tensors)
        replayed = _loss_and_gradients(model, batch)
    scale = max((float(gradient.abs().max()) for gradient in full[1] if gradient is not None), default=0.0)
    gaps = [_gap(one, other) for one, other in zip(full[1], replayed[1], strict=True)]
    loss = float((full[0] - replayed[0]).abs()) / max(float(full[0].abs()), 1e-30)
    return Difference(loss, max(gaps, default=0.0) / max(scale, 1e-30))


def _loss_and_gradients(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with eval_mode(model), torch.enable_grad():
        loss = loss_of(model(**batch), batch.get("attention_mask"))
        return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)


def _gap(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return float((one - other).abs().max())
