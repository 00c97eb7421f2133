"""The papers of a run -> one self-contained report.html: the answer first, then how it came about, then the proof.

It reads a run's folder and nothing else, and says nothing that isn't written there. The page holds no script, loads
nothing, and escapes whatever comes from a recipe, a label or a file name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine import records
from engine.errors import ENVIRONMENT, RunError
from engine.reporting import picture
from engine.reporting.charts import Chart, Series, Span, chart
from engine.reporting.picture import count, duration, portion, rates, weight

PAGES = Path(__file__).parent / "reporting/pages"
MOST_CLASSES = 24
"""Classes up to which a confusion matrix is drawn; beyond, a reader needs the worst of them and not a wall."""
LEVELS = 8
"""Shades of a table's cells."""


@dataclass(frozen=True)
class Papers:
    """What a run's folder says."""

    path: Path
    recipe: str
    """recipe.yaml as text."""
    asked: Mapping[str, Any]
    """The same as plain values."""
    plan: Mapping[str, Any]
    manifest: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    confusion: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    def of(self, kind: str, **fields: Any) -> list[Mapping[str, Any]]:
        """The events of a kind whose fields have these values."""
        return [e for e in self.events if e["event"] == kind and all(e.get(k) == v for k, v in fields.items())]


def read(path: Path) -> Papers:
    """The papers of a run's folder; raises `RunError` where it is none."""
    from ruamel.yaml import YAML

    try:
        recipe = (path / "recipe.yaml").read_text(encoding="utf-8")
        confusion = path / "confusion.json"
        return Papers(
            path=path.resolve(),
            recipe=recipe,
            asked=YAML(typ="safe", pure=True).load(recipe),
            plan=json.loads((path / "plan.json").read_text(encoding="utf-8")),
            manifest=json.loads((path / "manifest.json").read_text(encoding="utf-8")),
            events=tuple(records.read(path / "metrics.jsonl")),
            confusion=json.loads(confusion.read_text(encoding="utf-8")) if confusion.exists() else {},
        )
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no run's folder: {error}", ENVIRONMENT) from error


def write(path: Path) -> Path:
    """Write the report of the run in a folder, finished or not, and return its file."""
    from engine.keeping import durable

    page = render("report.html.j2", **view(read(path)))
    durable.replace(path / "report.html", page.encode())
    return path / "report.html"


def render(template: str, **values: Any) -> str:
    """A page of `pages/`. Its only style is the one whose hash its policy names."""
    from markupsafe import Markup

    style = (PAGES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _pages().get_template(template).render(style=Markup(style), style_hash=digest, **values)


@cache
def _pages() -> Any:
    """The templates, kept as they are compiled: a run writes its report after every stage."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"count": count, "weight": weight, "portion": portion, "rates": rates, "time": duration}
    pages.filters |= {"metric": metric, "dotted": _dotted}
    return pages


def _dotted(name: str) -> Any:
    """A module's name that a narrow page breaks at its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(step) for step in name.split("."))


def view(papers: Papers) -> dict[str, Any]:
    """Everything that the page of one run shows."""
    drawn = picture.picture(papers.plan, folded=len(papers.plan["layers"]) > picture.MOST_ROWS)
    return {
        "papers": papers,
        "state": state(papers),
        "answer": answer(papers),
        "drawn": drawn,
        "words": picture.WORDS,
        "curves": curves(papers),
        "stages": stages(papers),
        "moved": moved(papers),
        "classes": [classes(split, kept) for split, kept in papers.confusion.items()],
        "proved": next(iter(papers.of("proved")), None),
        "notes": [event["sentence"] for event in papers.of("note")],
    }


def state(papers: Papers) -> str:
    """How far the run has come, in words."""
    done, planned = len(papers.of("stage_ended")), len(papers.plan["stages"])
    return "finished" if papers.of("finished") else f"{done} of {planned} stages done"


@dataclass(frozen=True)
class Answer:
    """What came of a run."""

    metric: str
    value: float
    split: str
    others: tuple[tuple[str, str, float], ...]
    """Split, metric and value of everything else that was measured of the same weights."""


def deciding(papers: Papers) -> str:
    """The metric that decides what is best: the recipe's, else the first that was measured beside the loss."""
    evaluation = papers.asked.get("evaluation")
    named = evaluation.get("metric") if isinstance(evaluation, Mapping) else evaluation
    measured = (name for event in papers.of("evaluated") for name in event["metrics"] if name != "loss")
    return named or next(measured, "loss")


def answer(papers: Papers) -> Answer | None:
    """The last word on the weights that the run ended with; None while nothing has been judged."""
    ended = [event["metrics"] for event in papers.of("stage_ended") if event["metrics"]]
    judged = dict([("test", event["metrics"]) for event in papers.of("evaluated", split="test")][-1:])
    if ended:
        judged["validation"] = ended[-1]
    elif not judged:
        return None
    name, split = deciding(papers), next(iter(judged))
    if judged[split].get(name) is None:
        return None
    others = [(s, m, v) for s, metrics in judged.items() for m, v in metrics.items() if (s, m) != (split, name)]
    return Answer(name, judged[split][name], split, tuple(one for one in others if one[2] is not None))


def spans(papers: Papers) -> list[Span]:
    """The stages that have begun, on one axis of steps: as long as they were, or as they are planned to be."""
    planned = {stage["name"]: stage["steps"] for stage in papers.plan["stages"]}
    lasted = {event["stage"]: event["step"] for event in papers.of("stage_ended")}
    found: list[Span] = []
    for name in dict.fromkeys(event["stage"] for event in papers.of("stage_started")):
        start = found[-1].end if found else 0
        found.append(Span(name, start, start + lasted.get(name, planned.get(name, 0))))
    return found


def points(papers: Papers, events: Sequence[Mapping[str, Any]], value: Any) -> tuple[tuple[float, float], ...]:
    """Events on the one axis of steps, each with its value; those without one are left out."""
    start = {span.name: span.start for span in spans(papers)}
    placed = ((start.get(event["stage"], 0) + event["step"], value(event)) for event in events)
    return tuple((step, number) for step, number in placed if number is not None)


def curves(papers: Papers) -> list[Chart]:
    """The loss, each metric, and the learning rates over the steps of all stages."""
    name, bands, steps = deciding(papers), spans(papers), papers.of("step")
    judged = papers.of("evaluated", split="validation")
    measured = dict.fromkeys(key for event in judged for key in event["metrics"] if key != "loss")
    loss = [
        Series("training", points(papers, steps, lambda e: e["loss"]), "train"),
        Series("validation", points(papers, judged, lambda e: e["metrics"].get("loss")), "judge", dots=True),
    ]
    drawn = [chart("Loss", loss, bands)]
    for key in sorted(measured, key=lambda key: key != name):
        one = points(papers, judged, lambda e, key=key: e["metrics"].get(key))
        drawn.append(chart(f"{key.replace('_', ' ').capitalize()}", [Series("validation", one, "judge", True)], bands))
    highest = points(papers, steps, lambda e: max(e["rates"], default=None))
    lowest = points(papers, steps, lambda e: min(e["rates"], default=None))
    shown = [Series("highest", highest, "train")] + [Series("lowest", lowest, "quiet")] * (highest != lowest)
    drawn.append(chart("Learning rate", shown, bands, zero=True))
    return [one for one in drawn if one]


@dataclass(frozen=True)
class StageRow:
    """A stage as it was planned and as it went."""

    plan: Mapping[str, Any]
    share: float
    started: Mapping[str, Any] | None
    ended: Mapping[str, Any] | None
    seconds_per_step: float | None
    planned_bytes: int
    base_bytes: int
    """What the process took before the model was loaded."""
    on_cpu: bool

    @property
    def forecast(self) -> int | None:
        """Memory that the plan foretold, with what the process took by itself."""
        told = self.plan.get("forecast")
        return told["memory"]["process" if self.on_cpu else "total"] + self.base_bytes if told else None

    @property
    def replayed(self) -> float:
        return self.started.get("replayed", 0.0) if self.started else 0.0

    @property
    def work(self) -> float:
        """FLOPs of a step as it was computed, as a share of one that trains everything."""
        return self.plan["cached_cost"] if self.replayed else self.plan["cost"]


def stages(papers: Papers) -> list[StageRow]:
    """Every stage of the plan, with what became of it."""
    rows = []
    began = next(iter(papers.of("started")), {})
    for stage in papers.plan["stages"]:
        name = stage["name"]
        steps = [event for event in papers.of("step", stage=name) if event["seconds"] is not None]
        last = max((event["step"] for event in steps), default=0)
        rows.append(
            StageRow(
                plan=stage,
                share=stage["size"] / papers.plan["size"],
                started=next(iter(papers.of("stage_started", stage=name)), None),
                ended=next(iter(papers.of("stage_ended", stage=name)), None),
                seconds_per_step=math.fsum(event["seconds"] for event in steps) / last if last else None,
                planned_bytes=stage["optimizer_bytes"] + stage["gradient_bytes"],
                base_bytes=began.get("base_bytes", 0),
                on_cpu=began.get("device", "cpu") == "cpu",
            )
        )
    return rows


@dataclass(frozen=True)
class MovedRow:
    """How far one layer was from its start at the end of each stage."""

    name: str
    shares: tuple[tuple[float, int], ...]
    """Relative norm of the change, and the shade that stands for it."""


def moved(papers: Papers) -> list[MovedRow]:
    """The layers from the head down, with how far each has moved by the end of each stage that is over."""
    ended = [event["moved"] for event in papers.of("stage_ended") if event.get("moved")]
    names = [layer["name"] for layer in reversed(papers.plan["layers"])]
    return [
        MovedRow(name, tuple((m.get(name, 0.0), _shade(m.get(name, 0.0))) for m in ended))
        for name in names
        if ended and any(name in m for m in ended)
    ]


def _shade(share: float) -> int:
    """A shade for each factor of about 2.4: from a thousandth, where nothing is seen, to the whole."""
    return max(0, min(LEVELS, math.ceil((math.log10(share) + 3) / 3 * LEVELS))) if share else 0


@dataclass(frozen=True)
class Class:
    """How one class fared."""

    name: str
    rows: int
    precision: float | None
    recall: float | None

    @property
    def f1(self) -> float | None:
        if self.precision is None or self.recall is None:
            return None
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def classes(split: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Per-class precision and recall, worst first where there are many, and the pairs that are taken for each other."""
    labels, counts = kept["labels"], kept["counts"]
    taken = [sum(row[index] for row in counts) for index in range(len(labels))]
    table = [
        Class(name, sum(row), _share(row[i], taken[i]), _share(row[i], sum(row)))
        for i, (name, row) in enumerate(zip(labels, counts, strict=True))
    ]
    pairs = [
        (labels[i], labels[j], wrong, sum(row))
        for i, row in enumerate(counts)
        for j, wrong in enumerate(row)
        if wrong and i != j
    ]
    worst = sorted(table, key=lambda one: (one.f1 is None, one.f1))[:MOST_CLASSES]
    shades = [[round(LEVELS * math.sqrt(value / (sum(row) or 1))) for value in row] for row in counts]
    return {
        "split": split,
        "kept": kept,
        "classes": table if len(table) <= MOST_CLASSES else worst,
        "total": len(table),
        "pairs": sorted(pairs, key=lambda pair: -pair[2])[:5],
        "shades": shades if len(table) <= MOST_CLASSES else None,
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def metric(value: float | None) -> str:
    """A metric to three digits after the point, or four where it is small."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"
