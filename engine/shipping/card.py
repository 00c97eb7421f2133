"""A model card: README.md of an exported folder, with the header that the Hub reads. It says what a run's papers say.

Whatever comes from a recipe, a label or a path is data here: it can end no header, open no markup and leave no fence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from engine import report
from engine.grammar.source import clean
from engine.recipe import Recipe
from engine.reporting import picture

PICTURE = "schedule.png"
MOST_LABELS = 100
_HUB_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ACTIVE = re.compile(r"""([\\`*_\[\]<>|&~#$:@!{}^]|(?<=[Ww]{3})\.)""")


def write(
    folder: Path, papers: report.Papers, recipe: Recipe, labels: Sequence[str], code: str, more: Sequence[str] = ()
) -> None:
    """Write README.md and the picture of the schedule into a folder.

    `code` loads what lies there; `more` are paragraphs of Markdown about it, already safe.
    """
    drawn = _draw(papers, folder)
    body = [
        f"# {escaped(papers.name)}",
        _about(recipe),
        *([f"![Layers against stages: what is frozen, what trains, and when]({PICTURE})"] if drawn else []),
        "## Results",
        *_results(papers),
        *more,
        "## How to use it",
        fenced(code, "python"),
        "## Data",
        *_data(papers, recipe, labels),
        "## Training",
        _stages(papers.plan["stages"]),
        fenced(papers.recipe, "yaml"),
        _versions(papers.manifest),
    ]
    card = ModelCard(f"---\n{_header(papers, recipe).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")
    card.save(folder / "README.md")


def escaped(text: str) -> str:
    """A text within a line that Markdown takes for nothing else: no link, no emphasis, no HTML, no end of a cell."""
    return _ACTIVE.sub(r"\\\1", clean(" ".join(text.split())))


def code_span(text: str) -> str:
    """A text as code within a line, between more backticks than it holds in a row."""
    text = clean(" ".join(text.split())) or " "
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def fenced(text: str, language: str) -> str:
    """A text as a block of code, in a fence longer than any it holds."""
    text = "\n".join(map(clean, text.strip("\n").splitlines()))
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are safe already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _header(papers: report.Papers, recipe: Recipe) -> ModelCardData:
    """What the Hub reads: names are given only where they are names of the Hub."""
    base, data, kind = recipe.model.path, recipe.data.path, _type(recipe)
    scores = _scores(papers)
    results = [
        EvalResult(
            task_type=kind,
            dataset_type=data if _hub(data) else "private",
            dataset_name=clean(data)[:200],
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for split, metric, value in scores
    ]
    adapted = any(stage["attaches"] for stage in papers.plan["stages"])
    return ModelCardData(
        base_model=base if _hub(base) else None,
        datasets=[data] if _hub(data) else None,
        eval_results=results or None,
        library_name="transformers",
        metrics=sorted({metric for _, metric, _ in scores}) or None,
        model_name=papers.name,
        pipeline_tag=kind,
        tags=["frostline", *(["peft"] if adapted else [])],
    )


def _hub(name: str) -> bool:
    """Whether a name is one of the Hub's: data and models of files, packages and builders are not."""
    return bool(_HUB_NAME.fullmatch(name)) and "/" in name and not Path(name).exists()


def _type(recipe: Recipe) -> str:
    return recipe.task.type  # pyright: ignore[reportAttributeAccessIssue]


def _draw(papers: report.Papers, folder: Path) -> bool:
    if "layers" not in papers.plan:  # a plan from before pictures
        return False
    picture.save(papers.plan, folder / PICTURE)
    return True


def _about(recipe: Recipe) -> str:
    base = code_span(recipe.model.path)
    if _hub(recipe.model.path):
        base = f"[{base}](https://huggingface.co/{recipe.model.path})"
    revision = f", revision {code_span(recipe.model.revision)}" if recipe.model.revision else ""
    return f"Fine-tuned for {code_span(_type(recipe))} from {base}{revision} by Frostline, as the recipe below says."


def _scores(papers: report.Papers) -> list[tuple[str, str, float]]:
    """Split, metric and value of all that was measured of the weights that the run ended with, the answer first."""
    said = report.answer(papers)
    return [(said.split, said.metric, said.value), *said.others] if said else []


def _results(papers: report.Papers) -> list[str]:
    rows = [[escaped(split), escaped(metric), report.metric(value)] for split, metric, value in _scores(papers)]
    return [table(("split", "metric", "value"), rows)] if rows else ["Nothing was measured."]


def _data(papers: report.Papers, recipe: Recipe, labels: Sequence[str]) -> list[str]:
    name = code_span(recipe.data.path)
    if _hub(recipe.data.path):
        name = f"[{name}](https://huggingface.co/datasets/{recipe.data.path})"
    said = [f"{name}, {papers.plan['examples']:,} training examples."]
    if labels:
        shown = ", ".join(map(escaped, labels[:MOST_LABELS])) + (" and so on" if len(labels) > MOST_LABELS else "")
        said.append(f"{len(labels)} labels: {shown}.")
    return said


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for stage in stages:
        adapters = sorted({str(one["kind"]) for one in stage["attaches"]})
        rates = sorted({group["learning_rate"] for group in stage["groups"]}, reverse=True)
        cells = [escaped(stage["name"]), f"{stage['size']:,}", f"{stage['steps']:,}", picture.rates(rates)]
        rows.append([*cells, ", ".join(map(escaped, adapters)) or "none"])
    return table(("stage", "parameters that train", "steps", "peak rate", "new adapters"), rows)


def _versions(manifest: Mapping[str, Any]) -> str:
    known = {name: version for name, version in manifest.get("versions", {}).items() if version}
    said = ", ".join(f"{escaped(name)} {escaped(str(version))}" for name, version in known.items())
    return f"Seed {manifest.get('seed')}, {manifest.get('processes')} process(es). {said}."
