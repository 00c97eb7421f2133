"""What `frostline init` writes for a file of one's own: it is found, its columns are named, and it trains as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import running
import tiny

from engine import drafting, load, start
from engine.cli import main


def init(tmp_path: Path, data: str, task: str = "text-classification", model: str = "some/model") -> list[str]:
    """The lines on the data of a recipe that is made in `tmp_path/here`."""
    to = tmp_path / "here/recipe.yaml"
    to.unlink(missing_ok=True)
    text = drafting.write(model, task, data, to).read_text()
    return text[text.index("data:") :].split("\n\n")[0].splitlines()


def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "message,category\nx,y\n", "  columns: {text: message, label: category}"),
        ("a.csv", "label;review: all\nx;y\n", '  columns: {text: "review: all", label: label}'),
        ("a.tsv", "\ufeffwords\tlabel\nx\ty\n", "  columns: {text: words, label: label}"),
        ("a.jsonl", '{"words": "x", "label": 1}\n', "  columns: {text: words, label: label}"),
        (
            "a.csv",
            "id,message,category\n",
            "  # columns: {text: text, label: label}   # yours are id, message, category",
        ),
        ("a.csv", "text,label\n", "  # columns: {text: text, label: label}   # yours are text, label"),
        (
            "a.jsonl",
            "no json",
            "  # columns: {text: text, label: label}   # where yours have other names than the usual",
        ),
        ("a.csv", "\x1b[31m,b,c", "  # columns: {text: text, label: label}   # yours are [31m, b, c"),
        ("a.csv", "", "  # columns: {text: text, label: label}   # where yours have other names than the usual"),
    ],
)
def test_columns_are_named_where_only_one_reading_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, line: str
) -> None:
    (here(tmp_path, monkeypatch) / name).write_text(content, encoding="utf-8")
    assert init(tmp_path, name)[-1] == line


def test_data_elsewhere_are_found_by_their_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(tmp_path, monkeypatch)
    tiny.write_csv(tmp_path / "my rows/a.csv", tiny.reviews(4))
    assert "  data_files: {train: a.csv}" in init(tmp_path, "../my rows/a.csv")
    words = ["--model", "some/model", "--task", "text-classification", "--data", "../my rows/a.csv"]
    with pytest.raises(SystemExit):
        main(["init", *words, "--to", "other.yaml"])
    out, err = capsys.readouterr()
    root = "--data-root '../my rows'"
    assert (out, err) == (
        "other.yaml\n",
        f"next: frostline plan other.yaml {root}, then frostline run other.yaml {root}\n",
    )
    assert "  data_files: {train: none.csv}" in init(tmp_path, "none.csv")


def test_a_stage_of_one_step_trains_in_spite_of_its_warm_up(tmp_path: Path) -> None:
    root = running.place(tmp_path)
    for steps, warmup in ((1, 0), (11, 2)):
        keys = {"stages": [running.stage(steps=steps)], "training": {"warmup_steps": 0.1}}
        assert [stage.warmup_steps for stage in running.draft(root, **keys).plan.stages] == [warmup]


def test_a_file_of_ones_own_trains_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = here(tmp_path, monkeypatch)
    running.place(root)
    rows = [{"message": row["text"], "category": row["label"]} for row in tiny.reviews(40)]
    tiny.write_csv(root / "mine.csv", rows)
    drafting.write("model", "text-classification", "mine.csv", root / "recipe.yaml")
    keys = ["stages.head.epochs=null", "stages.head.steps=1", "stages.top.epochs=null", "stages.top.steps=1"]
    list(start.run(load.load(root / "recipe.yaml", keys), "mine", root, root / "runs"))
    assert "finished" in (root / "runs/mine/report.html").read_text()
