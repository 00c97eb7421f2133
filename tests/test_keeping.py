"""What runs have kept, as a user lists it and takes it away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import running
import torch

from engine import cli, store

HEAD = running.stage("head", epochs=2)


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0


def write(folder: Path, name: str, size: int, used: float, about: str = "") -> None:
    with store.Writer(folder, name, ("layer.3",), 2, about=about) as writer:
        for index in range(2):
            writer.put(index, [torch.ones(size)])
        writer.publish()
    os.utime(folder / name / store.HEADER, (used, used))


def test_what_a_run_keeps_is_listed_with_its_model_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running.run(running.place(tmp_path), freeze=running.FROZEN, stages=[HEAD], cache="auto")
    capsys.readouterr()
    command("cache", "ls", "--runs", str(tmp_path / "runs"))
    said = capsys.readouterr().out
    kept = store.listed(tmp_path / "runs" / store.FOLDER)
    assert sorted(one.rows for one in kept) == [16, 48]
    assert all(one.about == "BertForSequenceClassification of model" for one in kept)
    assert said.count("BertForSequenceClassification of model") == 2
    assert kept[0].cuts[0] in said
    assert "takes" in said.splitlines()[-1]


def test_shards_of_one_prefix_are_one_line(tmp_path: Path) -> None:
    write(tmp_path, "abc-float32-1-of-2", 8, 100.0, "a model")
    write(tmp_path, "abc-float32-2-of-2", 8, 300.0, "a model")
    write(tmp_path, "def-float32-1-of-1", 8, 200.0)
    first, second = store.listed(tmp_path)
    assert (first.about, first.rows, first.used) == ("a model", 4, 300.0)
    assert (second.about, second.rows, second.used) == ("", 2, 200.0)
    assert first.size == 2 * second.size


def test_a_store_whose_header_is_damaged_is_not_listed(tmp_path: Path) -> None:
    write(tmp_path, "abc-float32-1-of-1", 8, 100.0)
    (tmp_path / "abc-float32-1-of-1" / store.HEADER).write_text("{}")
    assert store.listed(tmp_path) == []


def test_clear_takes_all_away_or_what_was_not_used_for_longest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / store.FOLDER
    write(folder, "old-float32-1-of-1", 250_000, 100.0)
    write(folder, "new-float32-1-of-1", 250_000, 200.0)
    command("cache", "clear", "--runs", str(tmp_path), "--keep", "0.0021")
    assert [path.name for path in folder.glob("[!.]*")] == ["new-float32-1-of-1"]
    assert "2.0 MB freed, 2.0 MB left" in capsys.readouterr().out
    command("cache", "clear", "--runs", str(tmp_path))
    assert store.listed(folder) == []
    assert store.usage(folder) == 0


def test_where_nothing_was_kept_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("cache", "ls", "--runs", str(tmp_path / "none"))
    command("cache", "clear", "--runs", str(tmp_path / "none"))
    assert "0 B freed" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
