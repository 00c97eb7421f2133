"""Opens an exported file in a process of its own, and answers inputs with it: `python -I elsewhere.py FILE FOLDER`.

The process knows nothing of Frostline and nothing of transformers, so whatever it can open, others can. It opens what
this machine has just written and nothing else. `torch.export.load` reads a zip archive and, inside of it, some tensors
as pickles: whoever starts this process sets TORCH_FORCE_WEIGHTS_ONLY_LOAD, by which no pickle may name code.

FOLDER holds `0.inputs.safetensors`, `1.inputs.safetensors` and so on; `0.outputs.safetensors` and so on are written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = Mapping[str, np.ndarray]


def onnx(file: Path) -> Callable[[Arrays], Arrays]:
    """An ONNX file as a function of named arrays; it runs on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken, given = ([one.name for one in some] for some in (session.get_inputs(), session.get_outputs()))

    def answer(inputs: Arrays) -> Arrays:
        return dict(zip(given, session.run(None, {name: inputs[name] for name in taken}), strict=True))

    return answer


def torch(file: Path) -> Callable[[Arrays], Arrays]:
    """A file of torch.export as a function of named arrays."""
    from torch import export, from_numpy, no_grad

    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") != "1":
        raise PermissionError("TORCH_FORCE_WEIGHTS_ONLY_LOAD is not set to 1")
    program: Any = export.load(file).module()

    def answer(inputs: Arrays) -> Arrays:
        with no_grad():
            outputs = program(**{name: from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return answer


OPENERS = {".onnx": onnx, ".pt2": torch}


def main(file: Path, folder: Path) -> None:
    """Answer every file of inputs in a folder."""
    answer = OPENERS[file.suffix](file)
    for path in sorted(folder.glob("*.inputs.safetensors")):
        outputs = {name: np.ascontiguousarray(value) for name, value in answer(load_file(path)).items()}
        save_file(outputs, folder / path.name.replace("inputs", "outputs"))
    if strangers := {"engine", "transformers"} & set(sys.modules):
        raise ImportError(f"the file needs {', '.join(sorted(strangers))} to be opened")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
