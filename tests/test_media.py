"""Folders of pictures and sounds: splits, classes, metadata, what is refused, and files that can't be decoded."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import senses
import tiny
from PIL import Image
from scipy.io import wavfile

from engine import data
from engine.errors import PlanError, RunError
from engine.recipe import Recipe
from engine.tasks import pictures, sounds
from engine.tasks.files import UnreadableError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(source: Any, root: Path, task: str = "image-classification") -> data.Rows:
    source = {"path": source} if isinstance(source, str) else source
    return data.read(Recipe.model_validate({"model": "a/b", "task": {"type": task}, "data": source}), root)


def refused(source: Any, root: Path, task: str = "image-classification") -> tuple[str, str]:
    with pytest.raises(PlanError) as caught:
        read(source, root, task)
    (problem,) = caught.value.problems
    return ".".join(map(str, problem.key)), problem.sentence


# Folders


@pytest.mark.parametrize("judge", ["validation", "val", "dev"])
def test_splits_and_classes_are_the_names_of_folders(tmp_path: Path, judge: str) -> None:
    senses.pictures(tmp_path / "set", {"train": 12, judge: 6, "test": 3})
    rows = read("set", tmp_path)
    assert (len(rows.train), len(rows.validation or ()), rows.test) == (12, 6, None)
    assert rows.facts.labels == ("blue", "green", "red")
    assert [Path(file["path"]).parent.name for file in rows.train["image"]] == [
        rows.facts.labels[label] for label in rows.train["label"]
    ]


def test_folder_without_splits_is_held_out_from(tmp_path: Path) -> None:
    senses.pictures(tmp_path, {"set": 30})
    rows = read("set", tmp_path)
    assert (len(rows.train), len(rows.validation or ())) == (27, 3)


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("car", "train"):
        for index in range(12):
            place = tmp_path / "set" / name / f"{index}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            senses.picture("red", index + 100 * (name == "car")).save(place)
    assert read("set", tmp_path).facts.labels == ("car", "train")


def test_split_that_lacks_a_class_keeps_the_others_ids(tmp_path: Path) -> None:
    senses.pictures(tmp_path / "set", {"train": 12})
    (tmp_path / "set/test/red").mkdir(parents=True)
    senses.picture("red", 0).save(tmp_path / "set/test/red/a.png")
    rows = read({"path": "set", "splits": {"test": "test"}}, tmp_path)
    assert rows.test is not None
    assert list(rows.test["label"]) == [2]


def test_builder_takes_folders_patterns_and_odd_names(tmp_path: Path) -> None:
    senses.pictures(tmp_path / "[a] set", {"here": 12, "there": 6})
    files = {"train": "[a] set/here", "dev": "[[]a] set/there/*/*.png"}
    rows = read({"path": "imagefolder", "data_files": files}, tmp_path)
    assert (len(rows.train), len(rows.validation or ())) == (12, 6)


def test_metadata_says_more_than_folders(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / "set").mkdir(exist_ok=True)
        senses.picture("red", index).save(tmp_path / "set" / f"{index}.png")
    described = [{"file_name": f"{index}.png", "label": index / 4, "who": "me"} for index in range(20)]
    tiny.write_csv(tmp_path / "set/metadata.csv", described)
    rows = read("set", tmp_path)
    assert rows.facts.problem == "regression"
    assert "columns left aside: who" in rows.notes


def test_pictures_that_stand_twice_are_told_of(tmp_path: Path) -> None:
    senses.pictures(tmp_path / "set", {"train": 12, "validation": 3})
    for index in range(2):
        senses.picture("red", 7).save(tmp_path / f"set/train/red/twin{index}.png")
    (tmp_path / "set/validation/red/twin.png").write_bytes((tmp_path / "set/train/red/twin0.png").read_bytes())
    assert (
        "1 of 4 validation rows (25.0%) are in train as well: on them validation measures memory"
        in read("set", tmp_path).notes
    )


@pytest.mark.parametrize("how", ["archive", "link", "folder link", "nothing", "outside"])
def test_folder_is_refused(tmp_path: Path, how: str) -> None:
    root = tmp_path / "root"
    senses.pictures(root / "set", {"train": 6, "validation": 3})
    outside = senses.pictures(tmp_path / "other", {"train": 3})
    source: Any = "set"
    if how == "archive":
        (root / "set/train/more.zip").write_bytes(b"PK")
        said = "`more.zip` is an archive, and none is unpacked here; unpack it and name the folder"
    elif how == "link":
        (root / "set/train/red/link.png").symlink_to(outside / "train/red/train-002.png")
        said = "`link.png` is a link out of the data root; copy the file there"
    elif how == "folder link":
        (root / "set/train/black").symlink_to(outside)
        said = "`black` is a link out of the data root; copy the file there"
    elif how == "nothing":
        source = {"path": "audiofolder", "data_files": {"train": "set/train"}}
        said = "split train holds no file that `audiofolder` reads; look at its path"
    else:
        source = {"path": "imagefolder", "data_files": {"train": "../other"}}
        said = "`../other` lies outside the data root; move it below or choose another root"
    assert refused(source, root, "audio-classification" if how == "nothing" else "image-classification")[1] == said


def test_metadata_can_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    senses.picture("red", 0).save(tmp_path / "secret.png")
    senses.pictures(tmp_path / "root", {"set": 3})
    rows = [{"file_name": "../../secret.png", "label": index} for index in range(4)]
    tiny.write_csv(tmp_path / "root/set/metadata.csv", rows)
    said = "set/metadata.csv, row 1: `../../secret.png` is no file beside or below it"
    assert refused("set", tmp_path / "root")[1].startswith(said)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"image": f"{index}.png", "label": index % 2} for index in range(20)])
    key, said = refused("a.jsonl", tmp_path)
    assert key == "data.columns.image"
    assert said.startswith("a.jsonl: `image` holds string values, not pictures; name a folder of files")


# Files that can't be decoded


def damaged(root: Path) -> None:
    """A folder of 12 pictures to train on, of which four are damaged in a way of their own."""
    senses.pictures(root / "set", {"train": 12, "validation": 3})
    red = sorted((root / "set/train/red").glob("*.png"))
    red[0].write_bytes(red[0].read_bytes()[:-400])
    red[1].write_bytes(b"")
    red[2].write_text("not a picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    held = io.BytesIO()
    noise.save(held, "JPEG")
    (root / "set/train/red/whole.jpg").write_bytes(held.getvalue())
    red[3].write_bytes(held.getvalue()[:900])


def test_undecodable_pictures_are_refused_by_file_and_row(tmp_path: Path) -> None:
    damaged(tmp_path)
    key, said = refused("set", tmp_path)
    assert key == "data.columns.image"
    assert said.startswith("split train, row 9: red/train-002.png can't be decoded: ")
    assert "split train, row 10: red/train-005.png is empty; " in said
    assert "row 11: red/train-008.png can't be decoded: it is no picture of a known kind" in said
    assert said.endswith("; and 1 more; mend it, or `on_bad_rows: skip`")


def test_undecodable_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    damaged(tmp_path)
    rows = read({"path": "set", "on_bad_rows": "skip"}, tmp_path)
    (note,) = [note for note in rows.notes if "left out" in note]
    assert note.startswith("4 of 13 rows of split train (30.8%) are left out: split train, row 9: red/train-002.png")
    assert len(rows.train) == 9
    assert [Path(file["path"]).name for file in rows.train["image"]][-1] == "whole.jpg"


def test_rows_keep_their_numbers_when_others_are_left_out(tmp_path: Path) -> None:
    damaged(tmp_path)
    names = [f"{place.parent.name}/{place.name}" for place in sorted((tmp_path / "set/train").glob("*/*"))]
    rows = [{"file_name": name, "label": None if index == 12 else index % 2} for index, name in enumerate(names)]
    tiny.write_jsonl(tmp_path / "set/train/metadata.jsonl", rows)
    source = {"path": "imagefolder", "data_files": {"train": "set/train"}, "on_bad_rows": "skip"}
    assert refused(source, tmp_path)[1].startswith("split train, row 13: `label` has no value")


def test_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.png").write_text("x")
    assert "not one row can be read" in refused({"path": "set", "on_bad_rows": "skip"}, tmp_path)[1]


def test_picture_that_unfolds_to_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    senses.pictures(tmp_path / "set", {"train": 6})
    Image.new("1", (400, 300)).save(tmp_path / "set/train/red/bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert "red/bomb.png can't be decoded: Image size (120000 pixels) exceeds limit" in refused("set", tmp_path)[1]


# Pictures


def test_picture_is_upright_and_in_three_colours() -> None:
    level = np.array([[0, 30_000, 65_535]], dtype=np.uint16)
    assert np.asarray(pictures.read(stored(Image.fromarray(level))))[0, :, 0].tolist() == [0, 117, 255]
    turned = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pictures.read(stored(turned, exif=exif)).size == (2, 4)
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = b"\x00\x80"
    assert pictures.read(stored(palette)).mode == "RGB"


def stored(picture: Image.Image, **more: Any) -> dict[str, Any]:
    held = io.BytesIO()
    picture.save(held, "PNG", **more)
    return {"bytes": held.getvalue(), "path": "a/b.png"}


# Sounds


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_wav_of_every_kind_is_between_minus_one_and_one(dtype: str) -> None:
    wave = np.sin(2 * np.pi * 440 * np.arange(8_000) / 8_000) * 0.5
    scaled = {"uint8": wave * 128 + 128, "int16": wave * 2**15, "int32": wave * 2**31, "float32": wave}[dtype]
    held = io.BytesIO()
    wavfile.write(held, 8_000, np.stack([scaled, scaled], axis=1).astype(dtype))
    heard = sounds.read({"bytes": held.getvalue(), "path": None}, 16_000)
    again = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) * 0.5
    assert (heard.dtype, heard.shape) == (np.float32, (16_000,))
    assert np.abs(heard - again)[200:-200].max() < (0.01 if dtype == "uint8" else 1e-3)
    assert len(sounds.read({"bytes": held.getvalue(), "path": None}, 16_000, seconds=0.25)) == 4_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw[: len(raw) // 2], "a/b.wav can't be decoded: "),
        (lambda raw: raw[:20], "a/b.wav can't be decoded: "),
        (lambda _: b"", "a/b.wav is empty"),
    ],
)
def test_damaged_wav_is_unreadable(change: Any, said: str) -> None:
    held = io.BytesIO()
    wavfile.write(held, 8_000, senses.tone(440, 0.2, 8_000))
    file = {"bytes": change(held.getvalue()), "path": "x/a/b.wav"}
    with pytest.raises(RunError) as caught:
        sounds.check(file)
    assert str(caught.value).startswith(said if file["bytes"] else "a/b.wav is ")


def test_sound_too_short_to_hear_is_unreadable() -> None:
    held = io.BytesIO()
    wavfile.write(held, 8_000, senses.tone(440, 0.01, 8_000))
    with pytest.raises(UnreadableError, match="lasts 10 ms, too short"):
        sounds.check({"bytes": held.getvalue(), "path": "b.wav"})


def test_other_kinds_of_sound_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    file = {"bytes": b"fLaC" + b"0" * 40, "path": "a/b.flac"}
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(RunError, match=r"a/b.flac is no WAV file.*`pip install soundfile`") as caught:
        sounds.check(file)
    assert caught.value.exit_code == 3
    assert not isinstance(caught.value, UnreadableError)
    stereo = types.SimpleNamespace(read=lambda _, dtype: (np.ones((800, 2), dtype), 8_000))
    monkeypatch.setitem(sys.modules, "soundfile", stereo)
    assert sounds.read(file, 8_000).tolist() == [1.0] * 800


def test_sounds_are_read_from_folders(tmp_path: Path) -> None:
    senses.tones(tmp_path / "set")
    (tmp_path / "set/train/low/short.wav").write_bytes(b"RIFF")
    rows = read({"path": "set", "on_bad_rows": "skip"}, tmp_path, "audio-classification")
    assert rows.facts.labels == ("high", "low")
    assert len(rows.train) == 24
    assert any(note.startswith("1 of 25 rows of split train (4.0%) are left out") for note in rows.notes)
