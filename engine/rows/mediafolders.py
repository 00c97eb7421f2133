"""Folders of pictures or sounds as data: a file's class is the folder it lies in, or what a metadata file says of it.

They are laid out as the builders `imagefolder` and `audiofolder` of `datasets` want them, and read here: those two take
archives apart and follow links, and sounds they read only where torchcodec is installed. No file is opened here but
the metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, DatasetInfo, Features, Image, concatenate_datasets
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from engine.errors import PlanError, Problem

FOLDERS: Mapping[str, frozenset[str]] = {
    "imagefolder": frozenset(ImageFolder.EXTENSIONS),
    "audiofolder": frozenset(AudioFolder.EXTENSIONS),
}
"""The builders of `datasets` that read folders, and the suffixes of the files each takes."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files with a row for each picture or sound that lies beside or below them."""
FILE = "file_name"
"""The column that names a row's file; `mask_file_name` names a second one, the row's `mask`."""
SPLITS = frozenset({"train", "validation", "valid", "val", "dev", "test"})
"""Folders of these names are splits where a `train` is among them; a folder of any other name is a class."""
_PATH = ("data", "path")


def kind(place: Path) -> str | None:
    """The builder that reads a folder, or None where it holds neither pictures nor sounds."""
    for file in _walk(place):
        for builder, suffixes in FOLDERS.items():
            if file.suffix.lower() in suffixes:
                return builder
    return None


def splits(place: Path) -> dict[str, tuple[Path, ...]]:
    """Split -> the folder that holds it."""
    folders = {folder.name: (folder,) for folder in sorted(place.iterdir()) if folder.is_dir() and _seen(folder.name)}
    return folders if "train" in folders and set(folders) <= SPLITS else {"train": (place,)}


def load(
    builder: str, parts: Mapping[str, tuple[Path, ...]], root: Path, read: Callable[[Path], Dataset]
) -> dict[str, Dataset]:
    """Split -> its rows, given the folders or files of each; `read` gives the rows of a metadata file.

    Raises `PlanError` for an archive, a link out of `root`, a split without a file, and metadata that name no file or
    one that lies elsewhere.
    """
    files = {name: [file for place in places for file in _walk(place)] for name, places in parts.items()}
    for name, found in files.items():
        _refuse(name, builder, found, root)
    if any(file.name in METADATA for found in files.values() for file in found):
        return {name: _described(name, builder, found, read) for name, found in files.items()}
    media = {name: [file for file in found if _is_media(file, builder)] for name, found in files.items()}
    classes = sorted({file.parent.name for found in media.values() for file in found})
    depths = {len(file.parts) for found in media.values() for file in found}
    if len(classes) < 2 or len(depths) > 1:
        return {name: _rows(builder, found) for name, found in media.items()}
    return {name: _rows(builder, found, classes) for name, found in media.items()}


def _is_media(file: Path, builder: str) -> bool:
    return file.suffix.lower() in FOLDERS[builder]


def _rows(builder: str, files: Sequence[Path], classes: Sequence[str] = ()) -> Dataset:
    """A row for each file, with its class where there are classes."""
    column, feature = _feature(builder)
    features, columns = {column: feature}, {column: _paths(files)}
    if classes:
        features["label"] = ClassLabel(names=list(classes))
        columns["label"] = pa.array([classes.index(file.parent.name) for file in files], pa.int64())
    return Dataset(pa.table(columns), info=DatasetInfo(features=Features(features)))


def _feature(builder: str) -> tuple[str, Any]:
    return ("image", Image(decode=False)) if builder == "imagefolder" else ("audio", Audio(decode=False))


def _paths(files: Sequence[Path]) -> pa.StructArray:
    """Files as `datasets` keeps those that it hasn't read."""
    return pa.StructArray.from_arrays(
        [pa.nulls(len(files), pa.binary()), pa.array(map(str, files), pa.string())], ["bytes", "path"]
    )


def _described(name: str, builder: str, files: Sequence[Path], read: Callable[[Path], Dataset]) -> Dataset:
    """The rows of a split's metadata files, with the files that they name."""
    metadata = [file for file in files if file.name in METADATA]
    if not metadata:
        what = f"split {name} has no metadata file, as others have"
        raise PlanError([Problem(_PATH, what, f"write one ({', '.join(METADATA)}) beside its files")])
    return concatenate_datasets([_resolved(file, read(file), builder) for file in metadata])


def _resolved(metadata: Path, rows: Dataset, builder: str) -> Dataset:
    base, feature = _feature(builder)
    naming = [column for column in rows.column_names if column == FILE or column.endswith(f"_{FILE}")]
    if not naming:
        what = f"{metadata.parent.name}/{metadata.name} has no column `{FILE}`"
        raise PlanError([Problem(_PATH, what, "name each row's file in it, relative to the metadata file")])
    table, features = rows.data.table, dict(rows.features)
    for column in naming:
        new = base if column == FILE else column.removesuffix(f"_{FILE}")
        files = [_beside(metadata, index, named) for index, named in enumerate(rows[column])]
        table = table.drop_columns([column]).append_column(new, _paths(files))
        del features[column]
        features[new] = feature
    return Dataset(pa.table(table), info=DatasetInfo(features=Features(features)))


def _beside(metadata: Path, index: int, named: Any) -> Path:
    """The file that a row of a metadata file names; it lies beside or below the metadata file."""
    place = metadata.parent / f"{named}"
    if named and place.resolve().is_relative_to(metadata.parent.resolve()):
        return place
    what = f"{metadata.parent.name}/{metadata.name}, row {index + 1}: `{named}` is no file beside or below it"
    raise PlanError([Problem(_PATH, what, "give a path relative to the metadata file")])


def _walk(place: Path) -> Iterator[Path]:
    """The files below a folder, in order, or the file itself; hidden ones are left aside as by `datasets`."""
    if place.is_file():
        yield place
    for folder, inner, files in os.walk(place):
        inner[:] = sorted(name for name in inner if _seen(name))
        yield from (Path(folder, name) for name in sorted([*files, *_links(folder, inner)]) if _seen(name))


def _links(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_symlink()]


def _seen(name: str) -> bool:
    return not name.startswith((".", "__"))


def _refuse(name: str, builder: str, files: list[Path], root: Path) -> None:
    what = advice = ""
    for file in files:
        if file.suffix.lower() == ".zip":
            what, advice = f"`{file.name}` is an archive, and none is unpacked here", "unpack it and name the folder"
        elif file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            what, advice = f"`{file.name}` is a link out of the data root", "copy the file there"
    if not what and not any(file.suffix.lower() in FOLDERS[builder] for file in files):
        what, advice = f"split {name} holds no file that `{builder}` reads", "look at its path"
    if what:
        raise PlanError([Problem(_PATH, what, advice)])
