"""How fast this machine trains: the rate of a small piece of a model on it, forward and back. An estimate."""

from __future__ import annotations

import time

import torch
from torch import nn

SECONDS = 0.5
"""How long it is tried."""


def rate(width: int, rows: int, device: torch.device | None = None) -> float:
    """FLOPs per second of a feed-forward block of `width` on `rows` tokens, counted as a plan counts them."""
    block = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.LayerNorm(width))
    block.to(device)
    tokens = torch.zeros(rows, width, device=device)
    with torch.enable_grad():
        _pass(block, tokens)
        passes, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < SECONDS or not passes:
            _pass(block, tokens)
            passes += 1
    # Forward, and back to the weights of both and the input of the second: 5 products of 2 x rows x width x 4 width.
    return passes * 5 * 8 * rows * width**2 / taken


def _pass(block: nn.Module, tokens: torch.Tensor) -> None:
    loss = block(tokens).sum()
    torch.autograd.grad(loss, list(block.parameters()))
    if tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
