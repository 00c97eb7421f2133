"""The cheap passes over a model that signals look at: what each unit hands on, what is left without it, how the loss
pulls at it.

Forward passes without gradients, and one backward pass over some rows. Weights and flags are as they were afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import freezing
from engine.advising.bench import Bench
from engine.advising.budget import Clock
from engine.advising.trials import MICRO, Weights
from engine.advising.units import HEAD, Unit
from engine.frost.tracing import handed_on
from engine.outline import below
from engine.randomness import stable_seed
from engine.signals import Gradients
from engine.signals.linear_probe import narrow, standard

FEW = 256
"""Rows that are looked at once for every unit that is left out."""
GRADIENT_ROWS, GRADIENT_BATCH = 256, 8
"""Rows of the gradient pass, and how many share a batch: a signal's noise is that between batches."""
RAW_SIDE, RAW_BANDS = 8, 64
"""What is left of a picture, and of a recording, for the probe that knows no model."""


def features(
    bench: Bench,
    clock: Clock,
    units: Sequence[Unit] | None = None,
    chosen: np.ndarray | None = None,
    without: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Unit -> what it hands on, averaged over tokens or places: (rows, width).

    Of all units and rows where none are chosen. Modules `without` hand on what they were given.
    """
    learner, split = bench.learner, bench.learner.data.train
    rows = np.arange(bench.rows) if chosen is None else chosen
    order = np.arange(len(rows)) if split.lengths is None else np.argsort(split.lengths[rows], kind="stable")
    wanted = [unit for unit in (bench.units if units is None else units) if unit.name not in (HEAD, "rest")]
    kept: dict[str, list[Tensor]] = {unit.name: [] for unit in wanted}
    found: dict[str, Tensor] = {}
    hooks = [_skipped(_module(learner.model, name)) for name in without]
    hooks += [_kept(_module(learner.model, unit.last), unit.name, found) for unit in wanted]
    try:
        with freezing.eval_mode(learner.model):
            for first in range(0, len(order), MICRO):
                clock.check()
                batch = learner.collated(split, rows[order[first : first + MICRO]].tolist())
                with learner.accelerator.autocast():
                    learner.task.forward(learner.model, batch)
                for name, tensor in found.items():
                    kept[name].append(pooled(tensor, batch))
    finally:
        for hook in hooks:
            hook.remove()
    back = np.argsort(order)
    return {name: torch.cat(parts).numpy()[back] for name, parts in kept.items() if parts}


def bypassed(bench: Bench, clock: Clock, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Unit of blocks -> what the last unit hands on where this one hands on what it was given: (chosen rows, width).

    Units whose blocks change the shape of what they are given can't be left out, and are none of these.
    """
    last = [unit for unit in bench.units if unit.name not in (HEAD, "rest")][-1:]
    found = {}
    for unit in bench.units:
        blocks = [name for name in bench.outline.blocks if any(below(own, name) for own in unit.parameters)]
        if unit.name.startswith("block") and blocks:
            with suppress(_ChangesShapeError):
                found |= {unit.name: next(iter(features(bench, clock, last, chosen, blocks).values()))}
    return found


class _ChangesShapeError(Exception):
    """A block hands on something of another shape than it was given."""


def _skipped(module: nn.Module) -> Any:
    def hook(_module: nn.Module, args: Any, named: Mapping[str, Any], output: Any) -> Any:
        given, made = args[0] if args else named.get("hidden_states"), handed_on(output)
        if given is None or made is None or given.shape != made.shape:
            raise _ChangesShapeError
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return module.register_forward_hook(hook, with_kwargs=True)


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _kept(module: nn.Module, name: str, found: dict[str, Tensor]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = handed_on(output)
        if tensor is not None:
            found[name] = tensor

    return module.register_forward_hook(hook)


def pooled(tensor: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """(examples, width): the mean over tokens, padding left out, or over the places of a feature map."""
    given = tensor.detach().float().cpu()
    if given.dim() == 4:  # (examples, channels, height, width)
        return given.mean((2, 3))
    if given.dim() == 2:
        return given
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape == given.shape[:2]:
        weights = mask.cpu().float().unsqueeze(-1)
        return (given * weights).sum(1) / weights.sum(1).clamp(min=1)
    return given.mean(1)


def raw(bench: Bench) -> tuple[str, np.ndarray]:
    """What can be seen without any model, and its name: weighted words, small pictures or the bands of a sound."""
    examples = bench.learner.data.train.examples(np.arange(bench.rows))
    if "input_ids" in examples[0]:
        return "bag of words", narrow(_words([np.asarray(example["input_ids"]) for example in examples]))
    key = next(key for key in ("pixel_values", "input_values", "input_features") if key in examples[0])
    small = _small if key == "pixel_values" else _bands
    made = standard(np.stack([small(np.asarray(example[key], dtype=np.float32)) for example in examples]))
    return "small pictures" if key == "pixel_values" else "bands of sound", narrow(made)


def _words(rows: Sequence[np.ndarray]) -> np.ndarray:
    """TF-IDF of token ids, the 1,000 that most rows have; as long as a row of standardised features."""
    width = int(max(row.max() for row in rows)) + 1
    holds = np.zeros(width)
    for row in rows:
        holds[np.unique(row)] += 1
    chosen = np.argsort(-holds, kind="stable")[:1000]
    chosen = chosen[(holds[chosen] > 1) & (holds[chosen] < len(rows))]
    place = np.full(width, -1)
    place[chosen] = np.arange(len(chosen))
    table = np.zeros((len(rows), max(1, len(chosen))), dtype=np.float32)
    for index, row in enumerate(rows):
        found = place[row]
        np.add.at(table[index], found[found >= 0], 1)
    table *= np.log(len(rows) / np.maximum(holds[chosen], 1)) if len(chosen) else 1
    return 20 * table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-6)


def _small(picture: np.ndarray) -> np.ndarray:
    given = torch.from_numpy(picture)[None]
    return torch.nn.functional.adaptive_avg_pool2d(given, RAW_SIDE).flatten().numpy()


def _bands(sound: np.ndarray) -> np.ndarray:
    """Mean log power in bands of equal width; a sound that is a spectrogram already, averaged over time."""
    if sound.ndim > 1:
        return sound.mean(axis=-1 if sound.shape[-1] > sound.shape[-2] else -2)
    frames = (
        sound[: len(sound) // 512 * 512].reshape(-1, 512) if len(sound) >= 512 else np.pad(sound, (0, 512))[:512][None]
    )
    power = np.abs(np.fft.rfft(frames * np.hanning(512), axis=1)[:, :256]) ** 2
    return np.log(power.mean(0).reshape(RAW_BANDS, -1).mean(1) + 1e-8).astype(np.float32)


def gradients(bench: Bench, head: Weights, clock: Clock, seed: int) -> Gradients:
    """The gradient pass at a fitted head: dropout off, every weight's gradient, small batches dealt into two halves."""
    learner, split = bench.learner, bench.learner.data.train
    drawn = np.random.default_rng(stable_seed(seed, "gradients")).permutation(bench.rows)[:GRADIENT_ROWS]
    batches = [drawn[first : first + GRADIENT_BATCH] for first in range(0, len(drawn), GRADIENT_BATCH)]
    learner.restore(head)
    model = learner.model
    try:
        with freezing.eval_mode(model), torch.enable_grad(), freezing.all_trainable(model):
            sums: list[dict[str, Tensor]] = [{}, {}]
            squares: dict[str, Tensor] = {}
            counts = [0, 0]
            for number, rows in enumerate(batches):
                clock.check()
                batch = learner.collated(split, rows.tolist())
                with learner.accelerator.autocast():
                    loss = learner.task.forward(model, batch).loss
                found = freezing.parameters(model)
                grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
                counts[number % 2] += 1
                for name, grad in zip(found, grads, strict=True):
                    if grad is not None:
                        _add(sums[number % 2], name, grad.float())
                        _add(squares, name, grad.float().square())
    finally:
        learner.restore({name: bench.start[name] for name in head})
    both = sums[0].keys() & sums[1].keys()
    halves = tuple(
        {n: half[n].cpu() / count for n in half if n in both} for half, count in zip(sums, counts, strict=True)
    )
    total = sum(counts)
    return Gradients((halves[0], halves[1]), {n: squares[n].cpu() / total for n in both}, total)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.clone()
