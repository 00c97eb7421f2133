"""A model and its weights as one graph in one file, by torch.export or as ONNX; and the proof that it says the same.

The tracing is transformers' own (`transformers.exporters`). The graph is a forward pass in float32 without a loss: for
a model that writes, one step of writing, whose loop stays with whoever serves it. Batch and length stay open. No row of
the data gets into a file.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from engine.errors import ENVIRONMENT, GUARD, RunError
from engine.rows.split import Split
from engine.shipping import elsewhere
from engine.tasks import Task

FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
LIMIT = 1e-4
"""The most by which an exported file's answers may differ from the model's own."""
WHOLE = 2**31 - 2**24
"""Bytes up to which ONNX is one file; protobuf ends at 2 GiB."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Compared:
    """One batch on which a file was asked and the model itself."""

    shapes: dict[str, list[int]]
    difference: float
    """The largest of any output."""


def samples(task: Task, model: nn.Module, split: Split, collate: Any, members: int) -> list[Inputs]:
    """Three batches of what the graph takes, each of another size and length: one to trace, two to compare on."""
    counts = [min(count, len(split)) for count in (2, 1, 3)]
    made: list[Inputs] = []
    for start, count in zip((0, 2, 3), counts, strict=True):
        rows = [(start + at) % len(split) for at in range(count)]
        found = taken(task, model, collate(split.examples(rows)), members)
        while any(_length(model, found) == _length(model, other) for other in made) and _length(model, found) > 4:
            found = _shorter(model, found)
        made.append(found)
    return made


def taken(task: Task, model: nn.Module, batch: Mapping[str, Any], members: int) -> Inputs:
    """What of a collated batch the graph takes, and what the decoder reads where there is one."""
    given = task.inputs(batch)
    found = arranged(task, model, given, members)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift and "decoder_input_ids" in _accepted(model) - set(found) and "labels" in given:
        found["decoder_input_ids"] = shift(labels=given["labels"])
    return found


def arranged(task: Task, model: nn.Module, inputs: Mapping[str, Any], members: int) -> Inputs:
    """What of a model's inputs its graph takes: tensors that it does something with when there are no labels."""
    names = _accepted(model) - set(find_labels(type(model)))
    found = {name: value for name, value in inputs.items() if name in names and isinstance(value, Tensor)}
    if task.auto == "AutoModelForMultipleChoice":  # a server has a question with all of its choices at once
        found = {name: value.view(-1, members, value.shape[-1]) for name, value in found.items()}
    return found


def _accepted(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _length(model: nn.Module, inputs: Inputs) -> int:
    """The length of a batch of texts or of raw sound; 0 for what has a size of its own (pictures, spectrograms)."""
    name = str(model.main_input_name)
    one = inputs.get(name)
    flat = one is not None and (name == "input_ids" or (name == "input_values" and one.dim() == 2))
    return one.shape[-1] if one is not None and flat else 0


def _shorter(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same batch without its second column: what opens and what ends a text stays."""
    length = _length(model, inputs)
    keep = [at for at in range(length) if at != 1]
    alike = {name for name, value in inputs.items() if value.shape[-1] == length and name[:8] != "decoder_"}
    return {name: value[..., keep].contiguous() if name in alike else value for name, value in inputs.items()}


@contextlib.contextmanager
def plain(task: Task, model: nn.Module) -> Iterator[None]:
    """Inside, the model gives named tensors and nothing else: no cache of keys and values, no class of transformers."""
    whole = model.forward
    closed = {"use_cache": False} if "use_cache" in inspect.signature(whole).parameters else {}

    @wraps(whole)
    def forward(**inputs: Any) -> dict[str, Tensor]:
        outputs = whole(**{**inputs, **closed})
        return {name: value for name, value in task.served(outputs, inputs).items() if isinstance(value, Tensor)}

    model.forward = forward
    try:
        yield
    finally:
        model.forward = whole


def save(task: Task, model: nn.Module, inputs: Inputs, kind: str, path: Path) -> None:
    """Trace a model by its answer to `inputs`, and write graph and weights into a file.

    Raises `RunError` where the packages for it are missing, or where the model can't be traced.
    """
    model.eval().float()
    with plain(task, model), torch.no_grad(), _quietly():
        try:
            _torch(model, inputs, path) if kind == "torch" else _onnx(model, inputs, path)
        except ImportError as error:
            what = f"`--to {kind}` needs packages that are not installed ({' '.join(str(error).split())[:200]})"
            raise RunError(f"{what}; run `pip install frostline[export]`", ENVIRONMENT) from error
        except OSError:
            raise
        except Exception as error:  # a tracer trips over a model in its own many ways
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise RunError(f"{type(model).__name__} can't be traced as one graph ({said})", GUARD) from error


def _torch(model: nn.Module, inputs: Inputs, path: Path) -> None:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    program, _ = DynamoExporter().export_program(model, dict(inputs), DynamoConfig(dynamic=True))  # pyright: ignore
    program._example_inputs = None  # they are somebody's rows
    torch.export.save(program, path)


def _onnx(model: nn.Module, inputs: Inputs, path: Path) -> None:
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    program, _ = OnnxExporter().export_program(model, dict(inputs), OnnxConfig(dynamic=True))  # pyright: ignore
    _name_dimensions(program, model)
    size = sum(parameter.nbytes for parameter in model.parameters())
    onnx_ir.save(program, path, external_data=f"{path.name}.data" if size > WHOLE else None)


def _name_dimensions(program: Any, model: nn.Module) -> None:
    """Call what stays open `batch` and `length`, where a tool that reads the file looks for a name."""
    from onnx_ir import Shape, SymbolicDim

    names: dict[str, str] = {}
    for value in program.graph.inputs:
        words = ["batch", *(f"{value.name}_{axis}" for axis in range(1, len(value.shape)))]
        if value.name == model.main_input_name and value.name == "input_ids":
            words[-1] = "length"
        for dim, word in zip(value.shape, words, strict=True):
            if isinstance(dim, SymbolicDim) and dim.value and not dim.value.isdigit():
                names.setdefault(dim.value, word)
    for value in (*program.graph.inputs, *program.graph.outputs):
        dims = (dim.value if isinstance(dim, SymbolicDim) else dim for dim in value.shape)
        value.shape = Shape([int(dim) if str(dim).isdigit() else names.get(dim, dim) for dim in dims])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The tracers tell of their progress by every channel there is."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def compare(task: Task, model: nn.Module, batches: Sequence[Inputs], file: Path) -> list[Compared]:
    """Open a file in a process that knows nothing of us and ask it and the model the same.

    Raises `RunError` where it can't be opened there, or where any answer differs by more than `LIMIT`.
    """
    with tempfile.TemporaryDirectory() as place, plain(task, model), torch.no_grad():
        folder = Path(place)
        for number, batch in enumerate(batches):
            own = {name: value.contiguous() for name, value in batch.items()}
            save_file(own, folder / f"{number}.inputs.safetensors")
        _ask(file, folder)
        found = [
            Compared(
                {name: list(value.shape) for name, value in batch.items()},
                _difference(model(**batch), load_file(folder / f"{number}.outputs.safetensors")),
            )
            for number, batch in enumerate(batches)
        ]
    worst = max(one.difference for one in found)
    if not worst <= LIMIT:
        what = f"{file.name} differs from the model by {worst:.2g} in its answers, and {LIMIT:g} is the most"
        raise RunError(f"{what}; it is not kept", GUARD)
    return found


def _ask(file: Path, folder: Path) -> None:
    command = [sys.executable, "-I", elsewhere.__file__, str(file), str(folder)]
    environment = {**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise RunError(f"{file.name} can't be used in a process of its own ({said}); it is not kept", GUARD)


def _difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any number; infinite where names, shapes or what isn't finite differ."""
    if set(own) != set(other) or any(own[name].shape != other[name].shape for name in own):
        return float("inf")
    worst = 0.0
    for name, value in own.items():
        mine, theirs = value.double(), other[name].double()
        finite = mine.isfinite()
        if not torch.equal(finite, theirs.isfinite()):
            return float("inf")
        worst = max(worst, float((mine - theirs)[finite].abs().max()) if finite.any() else 0.0)
    return worst
