"""What a BatchNorm that trains remembers of its batches: the same on any number of devices.

Left alone, each device would count its own micro-batches, and the first one's count would be saved. Here they count in
the order of their numbers, once the step is sure to be taken, on all devices alike. A frozen one counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

Norm = nn.modules.batchnorm._BatchNorm


class Statistics:
    """The running means and variances of a model's BatchNorms that are in train mode."""

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, Norm) and m.training and m.running_mean is not None]
        self.momenta = [norm.momentum for norm in self.norms]

    def begin(self) -> None:
        """A step begins, for the first time or anew."""
        self.found: list[torch.Tensor] = []
        if self.norms and not hasattr(self, "start"):
            self.start, self.counted = self._read(), [int(norm.num_batches_tracked or 0) for norm in self.norms]

    @contextmanager
    def taking(self, counts: bool) -> Iterator[None]:
        """Around the passes on a micro-batch; one that is there only to keep a device in step counts nothing."""
        for norm in self.norms:
            norm.momentum = 1.0  # so that what it remembers is this micro-batch, and that alone
        try:
            yield
        finally:
            for norm, momentum in zip(self.norms, self.momenta, strict=True):
                norm.momentum = momentum
        if self.norms:
            own = self._read()
            self.found.append(torch.cat([own, own.new_tensor([float(counts)])]))

    def end(self, accelerator: Accelerator) -> None:
        """The step is taken: count every micro-batch, of all devices, turn by turn."""
        if not self.norms:
            return
        everyone = accelerator.gather(torch.stack(self.found)[None])  # device x turn x (statistics, whether it counts)
        for taken in everyone.transpose(0, 1).flatten(0, 1):
            if taken[-1]:
                self.counted = [count + 1 for count in self.counted]
                self._mix(taken[:-1])
        self._write()
        del self.start

    def _mix(self, taken: torch.Tensor) -> None:
        place = 0
        for norm, momentum, count in zip(self.norms, self.momenta, self.counted, strict=True):
            end = place + 2 * norm.num_features
            share = 1 / count if momentum is None else momentum
            self.start[place:end] = share * taken[place:end] + (1 - share) * self.start[place:end]
            place = end

    def _read(self) -> torch.Tensor:
        """All means and variances in a row, in float64 where the device has that."""
        parts = [part for norm in self.norms for part in (norm.running_mean, norm.running_var)]
        exact = torch.float32 if parts[0] is not None and parts[0].device.type == "mps" else torch.float64
        return torch.cat([part.detach().to(exact) for part in parts if part is not None])

    def _write(self) -> None:
        place = 0
        for norm, count in zip(self.norms, self.counted, strict=True):
            for part in (norm.running_mean, norm.running_var):
                if part is not None:
                    part.copy_(self.start[place : place + part.numel()])
                    place += part.numel()
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(count)
