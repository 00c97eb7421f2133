"""How much memory a run takes: of the device where it has its own, else of the process; and whose memory a model is in.

It measures and knows no stages.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

ALIGNMENT = 64
"""Bytes of which torch's own memory begins at a multiple."""

_PROCESS = Path("/proc/self")


def own(model: nn.Module) -> nn.Module:
    """The model, with all that lies where a file was mapped moved to memory of torch's own.

    On a CPU the last bits of a product depend on where its numbers begin, and transformers maps a file on one process
    that it copies on several.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        made_of_others = hasattr(tensor, "__tensor_flatten__")  # quantised
        if tensor.device.type == "cpu" and not made_of_others and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def taken(device: torch.device) -> int:
    """Bytes that are taken now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _ever()


def peak(device: torch.device) -> int:
    """Most bytes that were taken since `restart`, or ever where the system doesn't let a process ask for less."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _ever()


def restart(device: torch.device) -> None:
    """Let `peak` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux alone can, and not every container may
        (_PROCESS / "clear_refs").write_text("5")


def _status(field: str) -> int:
    """A figure of /proc/self/status, or 0 where there is none."""
    with suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _ever() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
