"""The one mutable thing of a run: model, optimizer and accelerator, from stage to stage.

Between two stages everything that was wrapped is unwrapped and wrapped anew. Unfreezing under a live DDP wrapper
trains without any error while the ranks drift apart: DDP reduces only what was trainable when it was built.
Data order, dropout and learning rate are functions of (seed, stage, step, micro-batch), so none of them is state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils._pytree import tree_leaves

from engine import adapters, freezing, models, optim
from engine.data import Encoded, Split
from engine.devices import layerdrop, memory, shards, shortage
from engine.devices.batchnorm import Statistics
from engine.devices.processes import agree, alike
from engine.errors import PlanError, Problem
from engine.frost.prefix import Cache
from engine.frost.shortcut import Shortcut, open_shortcut
from engine.modelling import narrowing
from engine.plan import Stage
from engine.randomness import seed_draws, stable_seed
from engine.recipe import Recipe
from engine.rows.batches import Batching
from engine.tasks import Facts
from engine.tasks.base import SEED

Batch = dict[str, Any]


class Learner:
    """Trains a model, one stage at a time."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        processor: Any,
        data: Encoded,
        facts: Facts,
        accelerator: Accelerator,
        batching: Batching,
        cache: Cache | None = None,
    ):
        self.recipe, self.data, self.facts, self.accelerator = recipe, data, facts, accelerator
        self.task, self.batching, self.cache = recipe.task, batching, cache
        self.spread = accelerator.is_fsdp2
        """Whether the model lies whole in the host's memory between stages, and is split over the devices within."""
        self.model = model if self.spread else memory.own(model.to(accelerator.device))
        self.processor = processor
        self.collate = self.task.collate(processor)
        self.moments: optim.Moments = {}
        self.moved: set[str] = set()
        """Every tensor that some stage could change."""
        self.trained: set[str] = set()
        """Every parameter that some stage trained."""
        self.loss_sum, self.weight_sum = 0.0, 0
        self.told_to_stop = False
        """Whether a signal has asked this process to stop after the step it is in."""
        self.stopping = False
        """Whether one has asked any process, so that all of them stop after the same step."""
        self.smoother = _smoother(recipe)

    # From stage to stage

    def enter(self, stage: Stage, resumed: bool = False, ahead: Sequence[Stage] = ()) -> int:
        """Make the model obey a stage; returns how many parameters brought their moments along.

        What lies below the frost lines of the stages `ahead` may be captured with this one's. A stage that is resumed
        has its adapters and its moments already. Raises `RunError` where the canary finds that something else than
        asked would train.
        """
        if not resumed:
            self.restructure(stage)
        names = frozenset(stage.trainable)
        if self.spread:
            layerdrop.refuse(self.model, (stage, *ahead), self.accelerator)
            self.whole, self.model = self.model, deepcopy(self.model)
        freezing.obey(self.model, names)
        agree(f"what trains in stage `{stage.name}`", sorted(freezing.trainable(self.model)))
        self.stage, self.share = stage, optim.multiplier(stage)
        self.epoch, self.indices = -1, np.empty(0, dtype=np.int64)
        self.shortcut = self._shortcut(ahead)
        if self.recipe.training.activation_checkpointing:
            self.shortcut.recompute()
        self.shortcut.train_mode()
        self.statistics = Statistics(self.model)
        self._wrap()
        if stage.moments == "drop":
            self.moments = {name: kept for name, kept in self.moments.items() if name in names}
        carried = optim.carry(self.optimizer.optimizer, self.moments) if stage.moments != "reset" or resumed else 0
        self.moved |= freezing.movable(self.model)
        self.trained |= names
        self.replay = self.shortcut.replaying()
        self.replay.__enter__()
        return carried

    def _wrap(self) -> None:
        """Try the stage and hand it to the accelerator; where that spreads the model, the other way round."""
        if not self.spread:
            shortage.fit(self)
        layerdrop.announce(self.model, self.accelerator)
        optimizer = optim.build(self.stage, freezing.parameters(self.model), self.recipe.training)
        with shards.spreading(self.accelerator):
            self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.spread:
            shortage.fit(self)
        found = freezing.parameters(self.model)
        self.parameters = [found[name] for name in self.stage.trainable]

    def _shortcut(self, ahead: Sequence[Stage]) -> Shortcut:
        """The stage's way past its frozen prefix, under the precision it trains in."""
        splits = [split for split in (self.data.train, self.data.validation) if split is not None]
        if hasattr(self.model, "peft_config") or any(stage.attaches for stage in ahead):
            ahead = ()  # adapters change what lies where
        once = "the examples are drawn anew in each epoch" if self.task.draws else ""
        once = once or ("a stream's examples pass by once" if self.data.train.passing else "")
        once = once or (shards.NO_CACHE if self.spread else "")
        with self.accelerator.autocast():
            return open_shortcut(
                self.model,
                splits,
                lambda examples: self.task.inputs(self.collate(examples)),
                None if once else self.cache,
                self._passes(self.stage),
                self._first_refusal,
                once or "the recipe says `cache: off`",
                [stage.trainable for stage in ahead if self._passes(stage) > 1],
            )

    def _passes(self, stage: Stage) -> float:
        """How often a stage goes over its training rows, evaluations included by their share of rows."""
        every = self.recipe.evaluation.eval_steps or stage.steps_per_epoch
        judged = 0 if self.data.validation is None else len(self.data.validation) / len(self.data.train)
        return stage.steps / stage.steps_per_epoch + judged * stage.steps / every

    def _first_refusal(self, refusal: str) -> str:
        return next(filter(None, gather_object([refusal])), "")

    def all_moments(self) -> optim.Moments:
        """What the optimizers so far remember, by parameter name."""
        live = optim.moments(self.optimizer.optimizer) if hasattr(self, "optimizer") else {}
        return self.moments | {name: shards.all_whole(kept) for name, kept in live.items()}

    def restructure(self, stage: Stage) -> None:
        """Put on the adapters that a stage starts with, the same on every device."""
        for attachment in stage.attaches:
            torch.manual_seed(stable_seed(self.recipe.seed, "adapter", attachment.name))
            self.moved |= models.put(self.model, attachment)
            self.model.to(self.device)

    def unwrap(self) -> None:
        """Make the model whole and nobody's but the learner's, if it isn't, and keep the moments by name."""
        if not hasattr(self, "wrapped"):
            return
        self.accelerator.wait_for_everyone()
        self.replay.__exit__(None, None, None)
        self.optimizer.zero_grad(set_to_none=True)
        self.moments = self.all_moments()
        if self.spread:
            held, self.model = self.tensors(), self.whole
            self.restore(held)
            del self.whole
        del self.wrapped, self.optimizer, self.shortcut, self.replay
        self.accelerator.free_memory()  # collects garbage as well
        for leftover in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(leftover, None)  # or the next `prepare` takes the model for prepared

    def leave(self) -> None:
        """Unwrap the model, and do with the adapters what the stage says."""
        self.unwrap()
        if self.stage.then != "keep":
            self.detach(self.stage.then)

    def detach(self, how: str) -> None:
        """Take the adapters off; merged, they have moved the weights below them."""
        before = {name: parameter.data_ptr() for name, parameter in freezing.parameters(self.model).items()}
        tuned = adapters.adapted(self.model)
        if how == "merge":
            narrowing.widen(self.model, tuned)
        adapters.detach(self.model, how)
        if how == "merge":
            self.moved |= {name for name in before if name.rpartition(".")[0] in tuned}

    # Training

    def step(self, step: int) -> float:
        """One optimizer step; returns the norm of its gradient before clipping.

        Raises `RunError` where the batch has no live label, or the gradient is not finite.
        """
        optim.set_rates(self.optimizer, self.share(step))
        before = self.loss_sum, self.weight_sum
        while True:
            self.statistics.begin()
            short = self._descend(step)
            limit = self.recipe.training.max_grad_norm or math.inf
            norm = math.nan if short else float(self.accelerator.clip_grad_norm_(self.parameters, limit))
            # a float16 scaler skips the step by itself
            if math.isfinite(norm) or (self.accelerator.scaler is not None and not short):
                break
            if not shortage.halved(self, short):
                what = f"stage `{self.stage.name}`, step {step + 1}: the gradient is not finite ({norm})"
                raise alike(self.accelerator, f"{what}; lower the learning rate or look at the data")
            self.optimizer.zero_grad(set_to_none=True)
            self.loss_sum, self.weight_sum = before
        self.statistics.end(self.accelerator)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _descend(self, step: int) -> bool:
        """The gradient of a step, its micro-batches one by one; whether this device's memory ran out on the way."""
        share = self.batching.share(self._indices(step), self.accelerator.process_index)
        batches = [self.collated(self.data.train, micro.indices) for micro in share]
        weights = [self.task.weight(batch) if micro.counts else 0 for micro, batch in zip(share, batches, strict=True)]
        total, self.stopping = self._total(sum(weights))
        if not total:
            raise alike(self.accelerator, f"stage `{self.stage.name}`, step {step + 1}: not one label is live")
        for turn, (micro, batch, weight) in enumerate(zip(share, batches, weights, strict=True)):
            seed_draws(self.recipe.seed, self.stage.index, step, micro.number)
            last = turn == len(share) - 1
            with self.statistics.taking(micro.counts):
                reached = self._taken(micro.indices, batch, weight, total, last)
            if reached != "end":
                shortage.join(self, micro.indices[:1], summed=last and reached == "backward")
                return True
        self.weight_sum += sum(weights)
        return False

    def _taken(self, indices: Sequence[int], batch: Batch, weight: int, total: int, last: bool) -> str:
        """Forward and backward on a micro-batch; in which of the two memory ran out, or `end`."""
        reached = "forward"
        try:
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                self.shortcut.feed(self.data.train, indices, batch)
                loss = self._loss(self.wrapped, batch) if weight else self.nothing(batch)
                reached = "backward"
                # DDP means over devices; the loss is a mean over all the units of the step.
                self.accelerator.backward(loss * (weight * self.accelerator.num_processes / total))
            self.loss_sum += loss.detach().double() * weight
        except torch.OutOfMemoryError:
            return reached
        return "end"

    def untaken_loss(self) -> tuple[float, float]:
        """The loss since it was last taken, summed over all units and devices, and the weight of these units."""
        sums = torch.tensor([float(self.loss_sum), float(self.weight_sum)], dtype=torch.float64)
        loss, weight = self.accelerator.reduce(sums.to(self._accounting_device), "sum").tolist()
        return loss, weight

    def taken_loss(self) -> float:
        """The mean loss since it was last taken, over all devices."""
        loss, weight = self.untaken_loss()
        self.loss_sum, self.weight_sum = 0.0, 0
        return loss / weight if weight else math.nan

    def _indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.stage.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.indices = epoch, self._order(epoch)
        size = self.recipe.batch_size
        return self.indices[place * size : (place + 1) * size]

    def _order(self, epoch: int) -> np.ndarray:
        strategy, size = self.recipe.training.train_sampling_strategy, self.recipe.batch_size
        return self.data.train.order(strategy, size, self.recipe.seed, self.stage.name, epoch)

    def collated(self, split: Split, indices: Sequence[int]) -> Batch:
        """The batch of some examples of a split, on the device."""
        examples = split.examples(indices)
        if self.task.draws and split is self.data.train:
            for index, example in zip(split.rows(indices), examples, strict=True):
                example[SEED] = stable_seed(self.recipe.seed, "draw", self.stage.name, self.epoch, index)
        batch = self.collate(examples)
        return {key: value.to(self.device) if hasattr(value, "to") else value for key, value in batch.items()}

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs = self.task.forward(model, batch)
        return self.smoother(outputs, batch["labels"], self.task.shifts) if self.smoother else outputs.loss

    def nothing(self, batch: Batch) -> torch.Tensor:
        """A loss of zero that still reaches every parameter, for a batch without live labels: their mean is 0 / 0."""
        outputs = dict(self.task.forward(self.wrapped, batch))
        leaves = tree_leaves({key: value for key, value in outputs.items() if key != "loss"})
        return sum(leaf.float().sum() for leaf in leaves if leaf.requires_grad) * 0.0

    def _total(self, weight: int) -> tuple[int, bool]:
        """The weight of a step over all devices, and whether any of them has been told to stop: asked in one go."""
        if self.accelerator.num_processes == 1:
            return weight, self.told_to_stop
        counts = torch.tensor([weight, self.told_to_stop], device=self._accounting_device)
        total, stop = self.accelerator.reduce(counts, "sum").tolist()
        return total, bool(stop)

    @property
    def _accounting_device(self) -> torch.device:
        # MPS has no float64; what is counted there is counted on the CPU, where one process needs no collective.
        device = self.accelerator.device
        return torch.device("cpu") if device.type == "mps" else device

    def tried(self, indices: Sequence[int], batch: Batch) -> torch.Tensor:
        """The loss of some examples on the model as it is, without DDP's hooks."""
        self.shortcut.feed(self.data.train, indices, batch)
        return self._loss(self.model, batch)

    # Judging

    @contextmanager
    def in_full(self) -> Iterator[None]:
        """Outside of any replay: writing reads keys and values that lie below the frost line."""
        if not hasattr(self, "replay"):
            yield
            return
        self.replay.__exit__(None, None, None)
        try:
            yield
        finally:
            self.replay = self.shortcut.replaying()
            self.replay.__enter__()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to compute, the one that decides first."""
        wanted = self.recipe.evaluation
        named = [wanted.metric, *wanted.metrics]
        if not any(named):
            named += self.task.default_metrics(self.facts)
        stages = self.recipe.stages if isinstance(self.recipe.stages, tuple) else ()
        named += [stage.early_stopping.metric for stage in stages if stage.early_stopping]
        return tuple(name for name in dict.fromkeys(named) if name and name != "loss")

    # Keeping

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor that the stage may change, whole and on the CPU."""
        moving = freezing.movable(self.model)
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items() if name in moving}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Put tensors back, by name, in the precision they were taken in: what has trained is float32 ever after."""
        tensors = self._held()
        with torch.no_grad():
            for name, value in snapshot.items():
                if tensors[name].dtype != value.dtype:
                    tensors[name].data = tensors[name].data.to(value.dtype)
                tensors[name].copy_(shards.like(tensors[name], value))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer, by its name in the bare model; if the model is spread, all processes ask."""
        return shards.all_whole(self._held()) if self.spread else self._held()

    def _held(self) -> dict[str, torch.Tensor]:
        if self.spread:
            shards.split(self.model)
        buffers = {freezing.bare(name): buffer for name, buffer in self.model.named_buffers()}
        return {**freezing.parameters(self.model), **buffers}


def _smoother(recipe: Recipe) -> Any:
    if not recipe.training.label_smoothing_factor:
        return None
    if not recipe.task.smooths:
        what = f"the loss of {recipe.task.type} has no classes to smooth"  # pyright: ignore
        raise PlanError([Problem(("training", "label_smoothing_factor"), what, "leave the key out")])
    from transformers.trainer_pt_utils import LabelSmoother

    return LabelSmoother(epsilon=recipe.training.label_smoothing_factor)
