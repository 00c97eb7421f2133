"""report.html: it says what the papers of a run say, whoever wrote them, and it can do nothing but be read."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import running

from engine import report
from engine.errors import ENVIRONMENT, RunError
from engine.records import Evaluated, Note, StageEnded
from engine.reporting import charts, comparison

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg onload=alert(1)>",
    "</title><svg/onload=alert(1)>",
    "<!--",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;script&gt;",
    "\u202e\u2066<b>",
]


class Page(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two stages, with a test split."""
    root = running.place(tmp_path_factory.mktemp("report"))
    stages = [running.stage("head", epochs=1), running.stage("top", unfreeze="@blocks[-2:]", learning_rate=1e-3)]
    happened = running.run(
        root,
        data={"path": "rows", "splits": {"test": "validation[:50%]", "validation": "validation[50%:]"}},
        freeze=running.FROZEN,
        stages=stages,
        evaluation={"metric": "f1", "metrics": ["accuracy"]},
        training={"logging_steps": 1},
    )
    (judged,) = [event for event in running.events(happened, Evaluated) if event.split == "test"]
    assert set(judged.metrics) == {"loss", "f1", "accuracy"}
    return root / "runs/recipe"


def test_run_leaves_its_report(ran: Path) -> None:
    page = Page((ran / "report.html").read_text(encoding="utf-8"))
    assert "finished" in page.text
    assert "The proof" in page.text
    assert {"script", "link", "img", "iframe", "form"}.isdisjoint(page.elements)
    assert {"src", "href", "style", "onclick"}.isdisjoint(page.attributes)


def test_policy_allows_the_page_its_one_style_and_nothing_else(ran: Path) -> None:
    text = (ran / "report.html").read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'; " in text


def test_answer_is_the_deciding_metric_of_the_test_split(ran: Path) -> None:
    papers = report.read(ran)
    (judged,) = papers.of("evaluated", split="test")
    found = report.answer(papers)
    assert found
    assert (found.metric, found.split, found.value) == ("f1", "test", judged["metrics"]["f1"])
    assert {(split, name) for split, name, _ in found.others} == {
        *(("test", name) for name in ("loss", "accuracy")),
        *(("validation", name) for name in ("loss", "f1", "accuracy")),
    }
    page = Page((ran / "report.html").read_text(encoding="utf-8"))
    assert report.metric(found.value) in page.text


def test_confusion_agrees_with_the_accuracy(ran: Path) -> None:
    papers = report.read(ran)
    (judged,) = papers.of("evaluated", split="test")
    counts = papers.confusion["test"]["counts"]
    right = sum(row[index] for index, row in enumerate(counts))
    assert right / sum(map(sum, counts)) == pytest.approx(judged["metrics"]["accuracy"])
    table = report.classes("test", papers.confusion["test"])
    f1 = [one.f1 or 0.0 for one in table["classes"]]
    assert sum(f1) / len(f1) == pytest.approx(judged["metrics"]["f1"])


def test_curves_lie_on_one_axis_of_steps(ran: Path) -> None:
    papers = report.read(ran)
    assert [(span.name, span.start, span.end) for span in report.spans(papers)] == [("head", 0, 6), ("top", 6, 10)]
    steps = report.points(papers, papers.of("step"), lambda event: event["loss"])
    assert [step for step, _ in steps] == list(range(1, 11))
    assert [chart.title for chart in report.curves(papers)] == ["Loss", "F1", "Accuracy", "Learning rate"]


def test_is_drawn_after_every_stage(tmp_path: Path) -> None:
    """A run that is killed after its first stage has a report of it."""
    from engine import load, start

    root = running.place(tmp_path)
    stages = [running.stage("head"), running.stage("top", unfreeze="@blocks[-1:]")]
    path = running.recipe(root, freeze=running.FROZEN, stages=stages)
    events = start.run(load.load(path), "recipe", root, root / "runs")
    for event in events:
        if isinstance(event, StageEnded):
            next(events)  # whatever comes next, the report has been written before it
            break
    events.close()
    page = Page((root / "runs/recipe/report.html").read_text(encoding="utf-8"))
    assert "1 of 2 stages done" in page.text
    assert "The proof" not in page.text


def test_run_outlives_a_report_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise OSError("no room")

    monkeypatch.setattr(report, "write", fail)
    happened = running.run(running.place(tmp_path))
    assert happened[-1] == running.events(happened, Note)[-1]
    assert "no report was written (no room)" in running.events(happened, Note)[-1].sentence
    assert report.read(tmp_path / "runs/recipe").of("finished")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_whatever_is_in_the_papers_stays_text(ran: Path, tmp_path: Path, payload: str) -> None:
    """A hostile label, module, metric, stage, note, recipe, version or file adds no element and no attribute."""
    plain = Page((ran / "report.html").read_text(encoding="utf-8"))
    folder = tmp_path / payload.replace("/", "_")[:80]
    folder.mkdir()
    for file in ("recipe.yaml", "plan.json", "manifest.json", "metrics.jsonl", "confusion.json"):
        text = (ran / file).read_text(encoding="utf-8")
        quoted = json.dumps(payload)[1:-1]
        for word in ("bert.pooler", "classifier", '"good', '"bad', "accuracy", '"top', "computes in full", "linux"):
            text = text.replace(word, word + quoted if file != "recipe.yaml" else word)
        (folder / file).write_text(text + (f"x-note: |\n  {payload}\n" if file == "recipe.yaml" else ""))
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert sorted(page.elements) == sorted(plain.elements)
    assert page.attributes == plain.attributes
    assert payload in page.text


def test_a_run_that_is_older_than_forecasts_has_its_report(ran: Path, tmp_path: Path) -> None:
    """Its plan foretells neither memory nor time; the page says so and everything else."""
    for file in ("recipe.yaml", "plan.json", "manifest.json", "metrics.jsonl", "confusion.json"):
        (tmp_path / file).write_bytes((ran / file).read_bytes())
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    for stage in plan["stages"]:
        del stage["forecast"]
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "The proof" in page.text
    assert [row.forecast for row in report.stages(report.read(tmp_path))] == [None, None]


def test_a_folder_without_papers_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run's folder") as caught:
        report.write(tmp_path)
    assert caught.value.exit_code == ENVIRONMENT


def test_comparison_says_what_differs(ran: Path, tmp_path: Path) -> None:
    root = running.place(tmp_path)
    running.run(root, freeze=running.FROZEN, evaluation="accuracy", seed=7)
    other = root / "runs/recipe"
    page = Page(comparison.write([ran, other], tmp_path / "deep/both.html").read_text(encoding="utf-8"))
    assert "2 runs side by side" in page.text
    assert "seed: None -> 7" in page.text
    for name in (str(ran), str(other), "Accuracy, validation", "f1, test"):
        assert name in page.text
    assert {"script", "link", "img"}.isdisjoint(page.elements)


@pytest.mark.parametrize("count", [1, 5])
def test_a_page_compares_two_to_four(ran: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(RunError, match="two to 4"):
        comparison.write([ran] * count, tmp_path / "page.html")


def test_many_classes_show_the_worst(ran: Path) -> None:
    size = report.MOST_CLASSES + 6
    counts = [[10 if i == j else 0 for j in range(size)] for i in range(size)]
    counts[3][4] = 90
    kept = {"labels": [f"c{i}" for i in range(size)], "counts": counts, "stage": "all", "step": 1}
    table = report.classes("test", kept)
    assert (table["classes"][0].name, len(table["classes"]), table["shades"]) == ("c3", report.MOST_CLASSES, None)
    assert table["pairs"] == [("c3", "c4", 90, 100)]
    assert "c3 taken for c4: 90 of 100" in report.render(
        "report.html.j2", **{**report.view(report.read(ran)), "classes": [table]}
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.41, 0.93, [0.4, 0.6, 0.8, 1]),
        (0, 324, [0, 100, 200, 300, 400]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_hold_the_data(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0, 1e-9, 1e9])
def test_a_flat_line_has_room_on_both_sides(value: float) -> None:
    ticks = charts.ticks(value, value)
    assert ticks[0] < value < ticks[-1]
    assert charts.chart("flat", [charts.Series("one", ((1, value),), "train")])


def test_what_is_no_number_is_left_out() -> None:
    points = ((1.0, math.nan), (2.0, 1.0), (3.0, math.inf), (4.0, 2.0))
    drawn = charts.chart("loss", [charts.Series("a", points, "train")])
    assert drawn
    assert drawn.lines[0].path.count("L") == 1
    assert charts.chart("none", [charts.Series("a", ((1.0, math.nan),), "train")]) is None


def test_long_runs_stay_small() -> None:
    points = tuple((float(step), 1.0 / step) for step in range(1, 100_001))
    drawn = charts.chart("loss", [charts.Series("a", points, "train")])
    assert drawn
    assert drawn.lines[0].path.count("L") <= charts.MOST_POINTS
    assert drawn.lines[0].path.endswith(f"L{charts.WIDTH - charts.RIGHT:g} {charts.HEIGHT - charts.BOTTOM:g}")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.006, "6 ms"), (12.94, "12.9 s"), (63.4, "1 min 3 s"), (7260, "2 h 1 min"), (None, "-")]
)
def test_durations_are_said_as_people_do(seconds: float | None, said: str) -> None:
    assert report.duration(seconds) == said
