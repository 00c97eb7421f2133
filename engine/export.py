"""A finished run -> a folder to hand on or to serve: weights, adapters, or both and the graph in one file; and a card.

`safetensors` is the model as transformers reads it, adapters merged; `adapter` what the run kept apart; `torch` and
`onnx` are self-contained graphs that have been opened elsewhere and have answered as the model does. A folder gets its
name when all of it is written and proved; it trains nothing, and leaves what the run wrote as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine import data, models, report
from engine.errors import ENVIRONMENT, REFUSED, PlanError, RunError
from engine.keeping import durable
from engine.keeping.folder import RunFolder, placed
from engine.load import load
from engine.prompts import PROMPTS
from engine.recipe import Recipe
from engine.report import metric
from engine.reporting.picture import weight
from engine.shipping import apart, card, graphs, quantized, usage

FORMATS = ("safetensors", "adapter", "torch", "onnx")
MARK = "export.json"
"""What an exported folder is known by; only such a one is ever replaced."""
VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Content:
    """What was written of a model."""

    said: tuple[str, ...]
    """Sentences for whoever asked."""
    code: str
    """Python that loads it."""
    facts: dict[str, Any]
    """What was measured of it, for export.json."""
    more: tuple[str, ...] = ()
    """Paragraphs for its card."""


def export(
    run: Path, to: str, out: Path | None = None, int8: bool = False, root: Path = Path()
) -> tuple[Path, list[str]]:
    """Export a run into a folder, `run/export/<to>` if left out; returns it, and sentences on what came of it.

    Local data lie below `root`: graphs are traced and compared on rows of them. Raises `RunError` where the run has
    no such thing, or a file doesn't say what the model says; nothing of it is left then.
    """
    folder, target = RunFolder(run), out or RunFolder(run).exports / to
    _refuse(folder, to, int8, target)
    papers, loaded = report.read(run), load(folder.recipe)
    recipe = _unpacked(loaded.recipe)
    act = {"safetensors": _weights, "adapter": _adapter}.get(to) or _graph(to, int8, root)

    def write(staged: Path) -> Content:
        content = act(folder, recipe, staged)
        card.write(staged, papers, recipe, _labels(folder.model), content.code, content.more)
        facts = {"format": to, "run": papers.name, "versions": _versions(), **content.facts}
        (staged / MARK).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return content

    try:
        durable.make_folder(target.parent)
        return target, list(placed(target, write).said)
    except PlanError as error:
        error.source = loaded.source
        raise
    except OSError as error:
        raise RunError(f"{target}: can't be written ({durable.reason(error)})", ENVIRONMENT) from error


def _unpacked(recipe: Recipe) -> Recipe:
    """The same recipe with every text by itself: several in one row are for training, nobody serves them so."""
    if not getattr(recipe.task, "packing", False):
        return recipe
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"packing": False})})


def _refuse(folder: RunFolder, to: str, int8: bool, target: Path) -> None:
    """Raise `RunError` for what can be known to fail before anything is read."""
    if to not in FORMATS:
        raise RunError(f"there is no export to `{to}`; there are {', '.join(FORMATS)}", REFUSED)
    if int8 and to != "onnx":
        raise RunError("`--int8` is a form of ONNX; write `--to onnx --int8`", REFUSED)
    if not folder.model.is_dir():
        raise RunError(f"{folder.path} holds no finished run, so there is no model to export", ENVIRONMENT)
    if to == "adapter" and not folder.adapter.is_dir():
        what = f"{folder.path} kept no adapters apart: none were on when it ended"
        raise RunError(f"{what}; `--to safetensors` exports the model with all it learned", REFUSED)
    if to != "adapter" and (kind := _prompt(folder.adapter)):
        what = f"{folder.path} ended with `{kind}` on, and virtual tokens can't be merged into a model"
        raise RunError(f"{what}; `--to adapter` exports them and all else that trained", REFUSED)
    if target.exists() and not (target / MARK).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} exists and is no export, so it is not replaced; name another folder", REFUSED)


def _prompt(adapter: Path) -> str:
    """The kind of virtual tokens among the adapters that a run kept apart; empty where there are none."""
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in adapter.rglob("adapter_config.json")]
    kinds = [str(config["peft_type"]).lower() for config in configs]
    return next((kind for kind in kinds if kind in PROMPTS), "")


def _weights(folder: RunFolder, recipe: Recipe, staged: Path) -> Content:
    shutil.copytree(folder.model, staged, dirs_exist_ok=True)
    size = sum(path.stat().st_size for path in staged.rglob("*.safetensors"))
    return Content((f"{weight(size)} of safetensors, adapters merged",), usage.weights(recipe.task, 2), {})


def _adapter(folder: RunFolder, recipe: Recipe, staged: Path) -> Content:
    shutil.copytree(folder.adapter, staged, dirs_exist_ok=True)
    names = sorted(path.parent.name for path in staged.glob("*/adapter_config.json")) or ["default"]
    size = sum(path.stat().st_size for path in staged.rglob("*.safetensors"))
    code = apart.code(recipe.model, recipe.task.auto, names, ".")
    return Content((f"{weight(size)} of adapters and what else trained",), code, {"adapters": names})


def _graph(to: str, int8: bool, root: Path) -> Callable[[RunFolder, Recipe, Path], Content]:
    """What writes a run's model as a graph."""

    def write(folder: RunFolder, recipe: Recipe, staged: Path) -> Content:
        if recipe.model.quantization_config is not None:
            what = f"{folder.path} has quantised weights, which no graph can hold"
            raise RunError(f"{what}; `--to safetensors` exports them as they are", REFUSED)
        if int8:
            quantized.refuse(recipe.task)
        rows = data.read(recipe, root)
        own = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "model", "revision": None})})
        processor = models.processor(own, folder.path)
        model = models.load(own, rows.facts, folder.path, processor).model.eval().float()
        judged, split = _judged(rows, recipe, processor, whole=int8)
        collate = recipe.task.collate(processor)
        traced, *others = graphs.samples(recipe.task, model, split, collate, rows.facts.members)
        file = staged / graphs.FILES[to]
        graphs.save(recipe.task, model, traced, to, file)
        compared = graphs.compare(recipe.task, model, others, file)
        _copy_papers(folder.model, staged)
        start = getattr(model.config, "decoder_start_token_id", None) or 0
        code = (usage.torch if to == "torch" else usage.onnx)(recipe.task, list(traced), rows.facts.members, start)
        content = _told(file, compared, code)
        if not int8:
            return content
        scores = {}
        for one in (file, quantized.write(file)):
            scores[one.name] = quantized.score(one, recipe, model, split, collate, rows.facts)
        return _with_int8(content, staged, f"{len(split):,} {judged} rows", scores)

    return write


def _judged(rows: data.Rows, recipe: Recipe, processor: Any, whole: bool) -> tuple[str, data.Split]:
    """The split that judges, encoded: its name and its first few rows, or all of them."""
    name = next(name for name in ("test", "validation", "train") if getattr(rows, name) is not None)
    chosen = getattr(rows, name)
    some = chosen if whole else chosen.select(range(min(6, len(chosen))))
    encoded = data.encode(replace(rows, train=some, validation=None, test=None), recipe.task, processor)
    return name, encoded.train


def _copy_papers(model: Path, staged: Path) -> None:
    """What prepares inputs and names labels, without the weights."""
    weights = {path.name for path in model.iterdir() if "safetensors" in path.name or path.name == "README.md"}
    shutil.copytree(model, staged, dirs_exist_ok=True, ignore=lambda _, names: weights & set(names))


def _told(file: Path, compared: Sequence[graphs.Compared], code: str) -> Content:
    """What a graph's comparison has found, in words."""
    worst = max(one.difference for one in compared)
    sizes = " and ".join(
        " x ".join(map(str, max(one.shapes.values(), key=len if len(one.shapes) > 9 else sum))) for one in compared
    )
    beside = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
    said = f"{file.name}, {weight(beside)}: opened in a process of its own and asked batches of {sizes}"
    said += f"; largest difference from the model {worst:.1e} ({graphs.LIMIT:.0e} is the most)"
    rows = [
        [", ".join(f"{name} {tuple(shape)}" for name, shape in one.shapes.items()), f"{one.difference:.1e}"]
        for one in compared
    ]
    table = card.table(("inputs", "largest difference"), [[card.escaped(cell) for cell in row] for row in rows])
    about = f"`{file.name}` is one forward pass with its weights: batch and length are open, there is no loss in it."
    facts = {"file": file.name, "compared": [asdict(one) for one in compared]}
    return Content((said,), code, facts, ("## The graph", about + " Asked the same as the model itself:", table))


def _with_int8(content: Content, staged: Path, on: str, scores: dict[str, dict[str, float]]) -> Content:
    """The same content, with the int8 file and what it costs."""
    sizes = {name: weight((staged / name).stat().st_size) for name in scores}
    names = list(next(iter(scores.values())))
    rows = [[f"`{file}`", sizes[file], *(metric(found[name]) for name in names)] for file, found in scores.items()]
    table = card.table(("file", "size", *map(card.escaped, names)), rows)
    pairs = [" -> ".join(metric(found[name]) for found in scores.values()) for name in names]
    said = f"{quantized.FILE}, {sizes[quantized.FILE]}: " + ", ".join(map(" ".join, zip(names, pairs, strict=True)))
    facts = {**content.facts, "int8": {"rows": on, "scores": scores}}
    more = (*content.more, f"On {on}:", table)
    return replace(content, said=(*content.said, f"{said} on {on}"), facts=facts, more=more)


def _labels(model: Path) -> list[str]:
    """The names of a saved model's labels; none where they are only numbers."""
    try:
        named = json.loads((model / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        labels = [str(named[key]) for key in sorted(named, key=int)]
    except (OSError, ValueError, AttributeError):
        return []
    return [] if all(name == f"LABEL_{at}" for at, name in enumerate(labels)) else labels


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
