"""The quickstart's pieces that need no training: questions made distinct, scores read from a run, pip's answer told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import _trec
import _venv
import quickstart


def test_questions_stand_in_one_split_once(tmp_path: Path) -> None:
    splits = _trec.prepare(tmp_path / "trec")
    texts = [row["text"].casefold() for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts) == sum(_trec.SIZES.values())
    assert {row["label"] for row in splits["test"]} == set(_trec.NAMES.values())
    assert _trec.prepare(tmp_path / "trec") == splits


def test_a_missing_file_is_written_again(tmp_path: Path) -> None:
    splits = _trec.prepare(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    assert _trec.prepare(tmp_path) == splits


def test_the_same_question_is_the_same_whatever_its_case_and_spaces() -> None:
    rows = _trec._distinct(["HUM:ind Who  was\ufffdit ?", "HUM:gr who was it ?", "LOC:city Where ?"])
    assert rows == [{"text": "Where ?", "label": "place"}, {"text": "Who was it ?", "label": "person"}]


def test_baselines_score_by_what_training_rows_say() -> None:
    train = [{"text": text, "label": label} for text, label in [("who was", "x"), ("who is", "x"), ("where is", "y")]]
    judged = [{"text": "where", "label": "y"}, {"text": "who", "label": "x"}]
    splits = {"train": train, "validation": judged, "test": judged[:1]}
    assert quickstart.majority(splits) == {"validation": 0.5, "test": 0.0}
    assert quickstart.tf_idf(splits) == {"validation": 1.0, "test": 1.0}


def test_table_shows_each_stage_at_its_best(tmp_path: Path) -> None:
    records = [
        {"event": "started"},
        {"event": "evaluated", "stage": "head", "split": "validation", "metrics": {"accuracy": 0.5}},
        {"event": "evaluated", "stage": "top", "split": "validation", "metrics": {"accuracy": 0.9}},
        {"event": "evaluated", "stage": "top", "split": "validation", "metrics": {"accuracy": 0.8}},
        {"event": "evaluated", "stage": "top", "split": "test", "metrics": {"accuracy": 0.85}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = quickstart.stages(tmp_path / "metrics.jsonl")
    assert scores == {"after stage head": {"validation": 0.5}, "after stage top": {"validation": 0.9, "test": 0.85}}
    assert quickstart.table(scores).splitlines()[-1].split() == ["after", "stage", "top", "0.900", "0.850"]


def test_a_failed_step_ends_with_the_first_error_of_its_log(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(_venv, "LOG", tmp_path / "setup.log")
    monkeypatch.setattr(_venv, "UNFINISHED", tmp_path / "setup.unfinished")
    code = "import sys; print('fine'); print('  ERROR: no such wheel'); print('ERROR: in short, no'); sys.exit(1)"
    with pytest.raises(SystemExit) as stopped:
        _venv._step("installing", [sys.executable, "-c", code])
    assert stopped.value.code == 3
    assert "installing failed: ERROR: no such wheel\n" in capsys.readouterr().err
    assert not _venv.UNFINISHED.exists()


def test_a_step_cut_off_leaves_its_mark(tmp_path: Path) -> None:
    mark = tmp_path / "setup.unfinished"
    kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    code = f"""
import sys, pathlib, _venv
_venv.LOG, _venv.UNFINISHED = pathlib.Path({str(tmp_path / "setup.log")!r}), pathlib.Path({str(mark)!r})
_venv._step("installing", [sys.executable, "-c", {kill!r}])
"""
    scripts = Path(_venv.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=scripts, stdout=subprocess.DEVNULL).returncode == -9
    assert mark.exists()


def test_a_stamp_follows_from_the_pins(tmp_path: Path, monkeypatch) -> None:
    stamp = _venv._stamp()
    pins = tmp_path / "constraints.txt"
    pins.write_text(_venv.CONSTRAINTS.read_text())
    monkeypatch.setattr(_venv, "CONSTRAINTS", pins)
    assert _venv._stamp() == stamp
    pins.write_text(pins.read_text() + "# changed\n")
    assert _venv._stamp() != stamp


def test_every_requirement_is_pinned() -> None:
    """Of Frostline itself and, in turn, of what it requires, as far as it is installed here."""
    pinned = {canonical(line.split("==")[0]) for line in _venv.CONSTRAINTS.read_text().splitlines() if "==" in line}
    seen, queue = set(), ["frostline"]
    while queue:
        seen.add(name := queue.pop())
        queue += sorted(required(name) - seen)
    assert len(seen) > 30
    assert not seen - pinned - {"frostline"}
    assert set(_venv.DEMO) <= pinned


def required(package: str) -> set[str]:
    """What a package needs on this machine; for Frostline what pyproject.toml says, whatever is installed of it."""
    if package == "frostline":
        project = tomllib.loads(_venv.PYPROJECT.read_text())["project"]
        lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    else:
        try:
            lines = requires(package) or []
        except PackageNotFoundError:  # an extra that is not installed here
            return set()
    wanted = [each for each in map(Requirement, lines) if not each.marker or each.marker.evaluate({"extra": ""})]
    return {canonical(each.name) for each in wanted}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
