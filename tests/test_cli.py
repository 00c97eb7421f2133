"""The command: what it prints where, and with which exit code it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli
from engine.errors import ENVIRONMENT, REFUSED, RunError
from engine.grammar.schema import schema

RECIPE = "model: a/b\ntask: text-classification\ndata: c/d\n"
STAGED = RECIPE + "stages:\n  - {name: head, epochs: 1}\n  - {name: all, epochs: 2}\n"


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "deep").mkdir(parents=True)
    (tmp_path / "recipes" / ".hidden").mkdir()
    (tmp_path / "recipes" / "_part.yaml").write_text("seed: 1\n")
    (tmp_path / "recipes" / "good.yaml").write_text(STAGED)
    (tmp_path / "recipes" / "deep" / "generated.yml").write_text(RECIPE + "stages: {type: gradual, epochs: 1}\n")
    (tmp_path / "recipes" / ".hidden" / "bad.yaml").write_text("seed: x\n")
    return tmp_path


def test_good_recipes_get_a_line_each(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run("check", "recipes") == 0
    assert capsys.readouterr() == (
        "recipes/_part.yaml  ok: a part of recipes\n"
        "recipes/deep/generated.yml  ok: text-classification, gradual stages\n"
        "recipes/good.yaml  ok: text-classification, 2 stages\n",
        "",
    )


def test_one_bad_recipe_refuses_them_all_and_the_rest_is_still_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "recipes" / "bad.yaml").write_text(RECIPE + "sed: 1\n")
    assert run("check", "recipes/bad.yaml", "recipes/good.yaml") == REFUSED
    out, err = capsys.readouterr()
    assert out == "recipes/good.yaml  ok: text-classification, 2 stages\n"
    assert err == "recipes/bad.yaml:4:1  sed: no such key; did you mean `seed`?\n"


def test_overrides_are_checked_too(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run("check", "recipes/good.yaml", "stages.all.epochs=3", "seed=7") == 0
    assert run("check", "recipes/good.yaml", "stages.all.epochs=many") == REFUSED
    assert capsys.readouterr().err == "command line  stages[all].epochs: needs a number, not the text `many`\n"


def test_a_file_may_be_called_like_an_override(folder: Path):
    (folder / "a=b.yaml").write_text(RECIPE)
    assert cli.split(["a=b.yaml", "a=b", "stages[all].epochs=1", "./c=d"]) == (
        [Path("a=b.yaml"), Path("./c=d")],
        ["a=b", "stages[all].epochs=1"],
    )


def test_nothing_to_check(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "empty").mkdir()
    assert run("check", "empty") == REFUSED
    assert run("check", "nope.yaml") == REFUSED
    err = capsys.readouterr().err
    assert "there is no recipe in `empty`" in err
    assert "nope.yaml  there is no such file" in err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]):
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out) == schema()


def test_a_wrong_command_line_is_told_in_words(capsys: pytest.CaptureFixture[str]):
    assert run("chek") == 2
    assert run("check") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_stops_a_run_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(**_: object) -> None:
        raise RunError("the disk is full\x1b[2J", ENVIRONMENT)

    monkeypatch.setattr(cli, "app", stop)
    assert run() == ENVIRONMENT
    assert capsys.readouterr().err == "the disk is full[2J\n"


def test_what_nobody_foresaw_stays_a_traceback(monkeypatch: pytest.MonkeyPatch):
    def crash(**_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(cli, "app", crash)
    with pytest.raises(KeyError, match="unforeseen"):
        cli.main([])


def test_colour_only_where_a_person_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run("check", "nope.yaml")
    assert capsys.readouterr().err.startswith("\x1b[2mnope.yaml\x1b[0m  there is")
    monkeypatch.setenv("NO_COLOR", "1")
    run("check", "nope.yaml")
    assert capsys.readouterr().err.startswith("nope.yaml  there is")


@pytest.mark.parametrize("words", [("schema",), ("check", "recipes")])
def test_a_reader_who_leaves_early_is_told_nothing(words: tuple[str, ...]):
    command = [sys.executable, "-m", "engine.cli", *words]
    child = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    child.wait()
