"""Where a device's memory runs out: the micro-batch is halved, never the batch, and by all processes or by none.

One that finds it out alone may neither leave, for the others would wait, nor take its share of the step. It takes
part with one example, and with a gradient that is no number: that is what all of them see at the end of the step.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object

from engine import freezing, optim
from engine.devices.processes import alike
from engine.errors import RunError
from engine.keeping.proof import canary
from engine.randomness import seed_draws

if TYPE_CHECKING:
    from engine.learner import Learner


def fit(learner: Learner) -> None:
    """Try the stage on the longest examples, as it will train; halve the micro-batch where memory runs out."""
    split = learner.data.train
    longest = np.arange(len(split)) if split.lengths is None else np.argsort(split.lengths)[::-1]
    while True:
        indices = longest[: learner.batching.micro].tolist()
        batch = learner.collated(split, indices)
        scratch = optim.build(learner.stage, freezing.parameters(learner.model), learner.recipe.training)
        short = False
        try:
            seed_draws(learner.recipe.seed, learner.stage.index, "canary")
            with learner.accelerator.autocast(), learner.shortcut.replaying():
                canary(learner.model, scratch, partial(learner.tried, indices, batch), learner.stage.name)
        except torch.OutOfMemoryError:
            short = True
        del scratch, batch
        if not halved(learner, short):
            break
    _refuse_lonely(learner)


def _refuse_lonely(learner: Learner) -> None:
    """Raise `RunError` where a step to come has a single example and a BatchNorm can't take it, before there are any.

    Of one value a channel, as pictures that have shrunk to a point leave, there is no variance.
    """
    stage, rows, norms = learner.stage, len(learner.data.train), learner.statistics.norms
    size = learner.batching.batch_size
    last = rows % size if stage.steps >= stage.steps_per_epoch else 0
    if not norms or not any(count and learner.batching.lonely(count) for count in (min(size, rows), last)):
        return
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        with learner.accelerator.autocast(), learner.shortcut.replaying(), torch.no_grad():
            learner.tried([0], learner.collated(learner.data.train, [0]))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        what = f"stage `{stage.name}`: a device comes to take one of {rows:,} examples by itself, and a BatchNorm "
        what += "has no variance of a single value; take another `batch_size` or `per_device_batch_size`, or freeze "
        raise alike(learner.accelerator, what + "`@norms`") from error
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def halved(learner: Learner, short: bool) -> bool:
    """Whether any process lacks memory, this one if `short`; then all take micro-batches of half the size from here on.

    Raises `RunError` where the micro-batch is one example.
    """
    if not any(gather_object([short])):
        return False
    gc.collect()
    torch.cuda.empty_cache()
    if learner.batching.micro == 1:
        sentence = f"stage `{learner.stage.name}`: one example alone doesn't fit the device's memory"
        raise alike(learner.accelerator, sentence)
    learner.batching = learner.batching.halved()
    return True


def join(learner: Learner, indices: Sequence[int], summed: bool) -> None:
    """Spoil the step on all devices, now that it can't be taken on this one.

    Raises `RunError` where that is too late, since the sum of the gradients has begun (`summed`), or where parts of the
    model itself have to come from the others; they find out that this process is gone.
    """
    accelerator = learner.accelerator
    if accelerator.num_processes == 1:
        return
    gc.collect()
    torch.cuda.empty_cache()
    if not summed and not learner.spread and accelerator.scaler is None:
        try:
            batch = learner.collated(learner.data.train, indices)
            learner.shortcut.feed(learner.data.train, indices, batch)
            accelerator.backward(learner.nothing(batch) * math.nan)
            return
        except torch.OutOfMemoryError:
            pass
    what = f"stage `{learner.stage.name}`: the memory of device {accelerator.process_index} ran out within a step"
    half = max(1, learner.batching.micro // 2)
    raise RunError(f"{what}; give `per_device_batch_size: {half}`, and it goes on from the last checkpoint")
