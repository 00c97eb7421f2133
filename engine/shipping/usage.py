"""The lines of Python that load what was exported and ask it something: for a model card, and a test that runs them.

Every value from a recipe stands in them as a Python literal. They are meant to be run in the folder they are about.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.tasks import Task

TEXT = 'inputs = prepares(["A sentence.", "Another one, somewhat longer."], padding=True, return_tensors="{kind}")'
SOUND = 'inputs = prepares([0.0] * 16_000, sampling_rate=prepares.sampling_rate, return_tensors="{kind}")'
ASKED = {
    "question-answering": 'inputs = prepares("What is frozen?", "The lake is frozen.", return_tensors="{kind}")',
    "fill-mask": 'inputs = prepares(f"A {{prepares.mask_token}} sentence.", return_tensors="{kind}")',
    "text-generation": 'inputs = prepares("Once upon a time", return_tensors="{kind}")',
    "image-classification": 'inputs = prepares(Image.new("RGB", (320, 240)), return_tensors="{kind}")',
    "image-segmentation": 'inputs = prepares(Image.new("RGB", (320, 240)), return_tensors="{kind}")',
    "object-detection": 'inputs = prepares(Image.new("RGB", (320, 240)), return_tensors="{kind}")',
    "audio-classification": SOUND,
    "automatic-speech-recognition": SOUND.replace("prepares.sampling", "prepares.feature_extractor.sampling"),
    "multiple-choice": (
        'inputs = prepares(["The lake is"] * {members}, [f"choice {{number}}" for number in range({members})],\n'
        '                  padding=True, return_tensors="{kind}")\n'
        "inputs = {{name: value[None] for name, value in inputs.items()}}  # (questions, choices, tokens)"
    ),
}
"""What is asked by way of example, where it isn't two sentences."""
WRITES = ("text-generation", "summarization", "translation")
"""Tasks whose models write by themselves when they are asked to."""


def weights(task: Task, members: int) -> str:
    """A model in transformers' own format."""
    asks = "model(**inputs)"
    if (kind := _type(task)) in WRITES:
        asks = "model.generate(**inputs, max_new_tokens=20)"
    says = (
        _last(kind, "outputs")
        if kind not in WRITES
        else "print(prepares.batch_decode(outputs, skip_special_tokens=True))"
    )
    return _lines(
        *_images(kind),
        "import torch",
        f"from transformers import {', '.join(sorted({task.auto, task.processor}))}",
        "",
        'path = "."  # this folder, or its name on the Hub',
        f"prepares = {task.processor}.from_pretrained(path)",
        f"model = {task.auto}.from_pretrained(path).eval()",
        _asked(task, "pt", members),
        "with torch.no_grad():",
        f"    outputs = {asks}",
        says,
    )


def torch(task: Task, names: Sequence[str], members: int, start: int) -> str:
    """A file of torch.export: it needs torch, and transformers for its inputs alone."""
    return _lines(
        *_images(_type(task)),
        "import torch",
        f"from transformers import {task.processor}",
        "",
        f'prepares = {task.processor}.from_pretrained(".")',
        'model = torch.export.load("model.pt2").module()  # only files you trust: the format may hold pickles',
        _asked(task, "pt", members),
        *_decoder(names, start, "torch.full((len(inputs[{first!r}]), 1), {start})", task),
        "with torch.no_grad():",
        f"    outputs = model(**{{name: inputs[name] for name in {list(names)!r}}})",
        _last(_type(task), "outputs"),
    )


def onnx(task: Task, names: Sequence[str], members: int, start: int) -> str:
    """An ONNX file: it needs onnxruntime, and transformers for its inputs alone."""
    numpy = ["import numpy"] if "decoder_input_ids" in names else []
    return _lines(
        *_images(_type(task)),
        *numpy,
        "import onnxruntime",
        f"from transformers import {task.processor}",
        "",
        f'prepares = {task.processor}.from_pretrained(".")',
        'session = onnxruntime.InferenceSession("model.onnx")',
        _asked(task, "np", members),
        *_decoder(names, start, "numpy.full((len(inputs[{first!r}]), 1), {start})", task),
        "taken = [one.name for one in session.get_inputs()]",
        "given = [one.name for one in session.get_outputs()]",
        "outputs = dict(zip(given, session.run(None, {name: inputs[name] for name in taken})))",
        _last(_type(task), "outputs"),
    )


def _type(task: Task) -> str:
    return task.type  # pyright: ignore[reportAttributeAccessIssue]


def _lines(*lines: str) -> str:
    return "\n".join(lines)


def _images(kind: str) -> list[str]:
    return ["from PIL import Image"] if kind.startswith(("image", "object")) else []


def _asked(task: Task, kind: str, members: int) -> str:
    return ASKED.get(_type(task), TEXT).format(kind=kind, members=members)


def _decoder(names: Sequence[str], start: int, made: str, task: Task) -> list[str]:
    """What a decoder begins to write after, where the graph has one: each step appends the likeliest token."""
    if "decoder_input_ids" not in names:
        return []
    return [f'inputs["decoder_input_ids"] = {made.format(first=names[0], start=start)}']


def _last(kind: str, outputs: str) -> str:
    if kind == "sentence-similarity":
        return f"print({{name: value.shape for name, value in {outputs}.items()}})"
    if kind == "question-answering":
        return f'print({outputs}["start_logits"].argmax(-1), {outputs}["end_logits"].argmax(-1))'
    return f'print({outputs}["logits"].argmax(-1))'
