"""From what a recipe says of its data to the splits there are: the Hub, files, folders, or files of a package.

Local files lie below the data root or they are not opened; nothing is fetched from a URL, and no code of a data set
ever runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from engine import packages
from engine.errors import ENVIRONMENT, Key, PlanError, Problem, RunError
from engine.recipe import Data
from engine.rows import delimiters, mediafolders

BUILDERS = ("csv", "json", "parquet", "text")
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_PATH: Key = ("data", "path")
_FILES: Key = ("data", "data_files")
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKED |= {b"\x04\x22\x4d\x18": "lz4", b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!\x1a\x07": "RAR"}
"""How packed files begin: `datasets` would unpack them whatever their name, and a small one may hold any amount."""


@dataclass(frozen=True)
class Origin:
    """The splits of a data set, none of them read yet where they are files."""

    names: Mapping[str, str]
    """Split -> how a user is told of it: the name of its one file, or the split's own."""
    load: Callable[[str], Any]
    """A split -> its rows: a `Dataset`, or an `IterableDataset` where they are read as a stream."""


def find(data: Data, root: Path) -> Origin:
    """The splits that a recipe's `data` has; files lie below `root`, which is the data root.

    Raises `PlanError` for what doesn't exist, is malformed or lies elsewhere, `RunError` for what can't be reached.
    """
    for value, key in ((data.path, _PATH), *((file, _FILES) for file in _listed(data.data_files))):
        _refuse_address(value, key)
    if data.path in BUILDERS:
        return _files(_by_split(data, root), data.path, data.streaming)
    if data.path in mediafolders.FOLDERS:
        return _media(data.path, _by_split(data, root), root)
    if data.path.startswith(packages.PREFIX) or _is_local(data.path, root):
        for key in ("name", "revision", "data_files"):
            if getattr(data, key) is not None:
                what = f"`{data.path}` is a file or folder, which has no `{key}`"
                raise PlanError([Problem(("data", key), what, "leave it out, or name a data set of the Hub")])
        place = _locate(data.path, root, _PATH)
        if not place.is_dir():
            return _files({"train": (place,)}, streaming=data.streaming)
        base = root if place.is_relative_to(root.resolve()) else place
        if not _has_tables(place) and (kind := mediafolders.kind(place)):
            return _media(kind, mediafolders.splits(place), base)
        return _files(_folder(place, base), streaming=data.streaming)
    return _hub(data, root)


def _listed(files: Any) -> list[str]:
    if isinstance(files, Mapping):
        return [file for value in files.values() for file in _listed(value)]
    return [files] if isinstance(files, str) else list(files or ())


def _refuse_address(path: str, key: Key) -> None:
    if "://" in path or "::" in path:
        raise PlanError([Problem(key, f"`{path}` is an address, and nothing is fetched from one", "download it first")])
    if not path or "\0" in path:
        raise PlanError([Problem(key, "the path is empty or holds a null character")])


def _is_local(path: str, root: Path) -> bool:
    pure = PurePosixPath(path)
    looks = pure.suffix in SUFFIXES or pure.is_absolute() or path.startswith((".", "~")) or ".." in pure.parts
    return looks or (root / path).exists()


def _locate(path: str, root: Path, key: Key) -> Path:
    """An existing file or folder, below `root` or inside a package."""
    if path.startswith(packages.PREFIX):
        return packages.locate(path, key)
    place = (root / path).resolve()
    if not place.is_relative_to(root.resolve()):
        raise PlanError([Problem(key, f"`{path}` lies outside the data root", "move it below or choose another root")])
    if not place.exists():
        beside = sorted(entry.name for entry in place.parent.iterdir()) if place.parent.is_dir() else []
        near = get_close_matches(place.name, beside, n=3)
        hint = f"near: {', '.join(near)}" if near else "paths start at the data root"
        raise PlanError([Problem(key, f"there is no file or folder `{path}`", hint)])
    return place


def _by_split(data: Data, root: Path) -> dict[str, tuple[Path, ...]]:
    """Split -> its files, of `data_files`; a plain file or list of files is the split `train`."""
    if not data.data_files:
        what = f"`{data.path}` needs to know which files to read"
        raise PlanError([Problem(_FILES, what, "write `data_files: {train: FILE, test: FILE}`")])
    files = data.data_files if isinstance(data.data_files, Mapping) else {"train": data.data_files}
    return {
        split: tuple(place for file in _listed(listed) for place in _matching(file, root, (*_FILES, split)))
        for split, listed in files.items()
    }


def _matching(file: str, root: Path, key: Key) -> list[Path]:
    """The file, or the files that a pattern such as `part-*.csv` matches, sorted by name."""
    if file.startswith(packages.PREFIX) or not set(file) & set("*?"):
        return [_locate(file, root, key)]
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise PlanError([Problem(key, f"`{file}` lies outside the data root", "give a path below it")])
    found = sorted(place for place in root.glob(file) if place.is_file())
    if not found:
        raise PlanError([Problem(key, f"`{file}` matches no file", "paths start at the data root")])
    return [_locate(str(place.relative_to(root)), root, key) for place in found]


def _folder(place: Path, root: Path) -> dict[str, tuple[Path, ...]]:
    """The files of a folder by split: `train.csv`, or the shards `train-00000-of-00002.parquet` and so on."""
    found: dict[str, tuple[Path, ...]] = {}
    for file in sorted(place.iterdir()):
        if file.suffix in SUFFIXES and file.is_file():
            split = file.stem.split("-of-")[0].rstrip("0123456789").rstrip("-") if "-of-" in file.stem else file.stem
            found[split] = (*found.get(split, ()), file)
    if not found:
        what = f"the folder `{place.name}` holds no file that can be read as data"
        raise PlanError([Problem(_PATH, what, f"call it train{', train'.join(SUFFIXES)}")])
    for split, files in found.items():
        if len({file.suffix for file in files}) > 1:
            what = f"the folder `{place.name}` has {' and '.join(file.name for file in files)}"
            raise PlanError([Problem(_PATH, what, f"keep one of them as the split `{split}`")])
        _contained(files, root)
    return found


def _has_tables(place: Path) -> bool:
    """Whether a folder holds files of rows, and not only a metadata.csv that says more of its pictures."""
    return any(file.suffix in SUFFIXES and file.stem != "metadata" for file in place.iterdir() if file.is_file())


def _media(builder: str, parts: Mapping[str, tuple[Path, ...]], root: Path) -> Origin:
    """The splits of a folder of pictures or sounds."""
    found = mediafolders.load(builder, parts, root, lambda file: _read((file,), file.name, None))
    return Origin({split: f"split {split}" for split in found}, lambda split: found[split])


def _contained(files: tuple[Path, ...], root: Path) -> None:
    for file in files:
        if not file.resolve().is_relative_to(root.resolve()):
            raise PlanError([Problem(_PATH, f"`{file.name}` is a link out of the data root", "copy the file there")])


def _files(splits: Mapping[str, tuple[Path, ...]], builder: str | None = None, streaming: bool = False) -> Origin:
    names = {split: files[0].name if len(files) == 1 else f"split {split}" for split, files in splits.items()}
    return Origin(names, lambda split: _read(splits[split], names[split], builder, streaming))


def _read(files: tuple[Path, ...], name: str, builder: str | None, streaming: bool = False) -> Any:
    """The rows of files of one kind, in the order of the files: a `Dataset`, or an `IterableDataset` by `streaming`."""
    import glob

    from datasets import load_dataset

    kind = builder or SUFFIXES.get(files[0].suffix)
    if kind is None:
        raise PlanError([Problem(_PATH, f"{name} is no file of rows", f"files of rows end in {', '.join(SUFFIXES)}")])
    # pandas would read a text such as `NA`, `None` or `null` as missing; only an empty cell is.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    if kind == "csv":
        options["sep"] = delimiters.of(files[0])
    for file in files:
        _refuse_file(file)
    if kind == "csv" and streaming:
        _refuse_uneven(files, delimiters.FIRST)
    with quietly(), reading(name, files if kind == "csv" else ()):
        listed = [glob.escape(str(file)) for file in files]
        if streaming:
            return load_dataset(kind, data_files=listed, split="train", streaming=True, **options)
        rows = load_dataset(kind, data_files=listed, split="train", **options)
        rows.data.table.validate(full=True)  # JSON's reader takes bytes that are no UTF-8 for text
    table = rows.data.table
    if kind == "csv" and (table.num_columns == 1 or table.column(table.num_columns - 1).null_count):
        _refuse_uneven(files)
    if "__index_level_0__" in rows.column_names:  # pandas takes the first cells for names of the rows
        _refuse_uneven(files)
        what = f"{name} has rows with more cells than its header has names"
        raise PlanError([Problem(_PATH, what, "put cells that hold the delimiter in quotes")])
    return rows


def _refuse_uneven(files: tuple[Path, ...], most: int | None = None) -> None:
    if problem := delimiters.uneven(files, _PATH, most):
        raise PlanError([problem])


def _refuse_file(file: Path) -> None:
    """Raise `PlanError` for what is empty, packed, or no ordinary file, such as a pipe that is never written to."""
    if not file.is_file():
        raise PlanError([Problem(_PATH, f"{file.name} is no ordinary file", "copy its rows into one")])
    with reading(file.name), file.open("rb") as stream:
        start = stream.read(262)
    if not start:
        raise PlanError([Problem(_PATH, f"{file.name} is empty", "it needs at least one row")])
    packed = next((kind for sign, kind in _PACKED.items() if start.startswith(sign)), "")
    if packed or start[257:] == b"ustar":
        what = f"{file.name} is packed ({packed or 'tar'}), and nothing is unpacked here"
        raise PlanError([Problem(_PATH, what, "unpack it and name what was in it")])


@contextmanager
def reading(name: str, tables: tuple[Path, ...] = ()) -> Iterator[None]:
    """Turns the many ways in which rows can't be read into one sentence; `tables` are csv files to look at again."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except OSError as error:
        raise _unreadable(name, error) from error
    except RecursionError as error:
        raise PlanError([Problem(_PATH, f"{name} can't be read: its values are nested too deep")]) from error
    except (DatasetsError, ValueError, TypeError, StopIteration) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and not isinstance(cause, ValueError) and cause.errno:
            raise _unreadable(name, cause) from error
        _refuse_uneven(tables)
        said = _first_line(cause)
        if not said or "corresponds to no data" in said:
            said = "it holds no rows"
        what = f"{name} can't be read: {said}"
        raise PlanError(
            [Problem(_PATH, what, "look at the file, and whether it is of the kind its name says")]
        ) from error


def _unreadable(name: str, error: OSError) -> RunError:
    """The file itself can't be read, or the cache that its rows go through can't be used."""
    if error.filename and name not in str(error.filename):
        sentence = f"the cache of data sets can't be used: {_first_line(error)}; HF_HOME says where it lies"
        return RunError(sentence, ENVIRONMENT)
    return RunError(f"{name} can't be read: {_first_line(error)}", ENVIRONMENT)


def _hub(data: Data, root: Path) -> Origin:
    """The splits of a data set of the Hub, downloaded or from the local cache."""
    from datasets import load_dataset

    for file in _listed(data.data_files):
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise PlanError([Problem(_FILES, f"`{file}` is no file of the data set", "give a path inside it")])
    if Path(data.path).exists():  # `datasets` prefers a folder of the current directory, wherever the root is
        raise PlanError([Problem(_PATH, f"`{data.path}` lies in the current directory, outside the data root")])
    if data.path.count("/") > 1 or not data.path.replace("/", "").replace("-", "").replace(".", "").isidentifier():
        what = f"`{data.path}` is no file or folder below the data root, and no name of the Hub"
        raise PlanError([Problem(_PATH, what, "names of the Hub look like `owner/name`")])
    files = (
        {key: list(_listed(value)) for key, value in data.data_files.items()}
        if isinstance(data.data_files, Mapping)
        else _listed(data.data_files) or None
    )
    with quietly(), _hub_said_plainly(data):
        splits: Any = load_dataset(
            data.path, data.name, revision=data.revision, data_files=files, streaming=data.streaming
        )
    return Origin({str(split): f"split {split}" for split in splits}, lambda split: splits[split])


@contextmanager
def _hub_said_plainly(data: Data) -> Iterator[None]:
    """Turns the many ways in which the Hub says no into one sentence."""
    try:
        yield
    except Exception as error:
        raise _plainly(data, error) from error


def _plainly(data: Data, error: Exception) -> Exception:
    from datasets.exceptions import DatasetGenerationError

    words, path = _first_line(error), data.path
    if "gated" in words:
        return RunError(f"{path} is gated: ask for access on its page, then `hf auth login`", ENVIRONMENT)
    if isinstance(error, ConnectionError | TimeoutError) or "offline" in words.lower() or "reach" in words:
        missing = f"{path} is not on this machine and the Hub can't be reached"
        return RunError(f"{missing}: check the network, HF_HOME and HF_HUB_OFFLINE", ENVIRONMENT)
    if words.startswith("Revision"):
        return PlanError([Problem(("data", "revision"), f"{path} has no revision `{data.revision}`")])
    if isinstance(error, FileNotFoundError):
        what = f"{path} is not on the Hub, or it is private, or it holds no data files"
        return PlanError([Problem(_PATH, what, "check its spelling; for a private one `hf auth login`")])
    if "BuilderConfig" in words or "Config name" in words:
        what = f"{path} has no configuration `{data.name}`" if data.name else f"{path} has several configurations"
        return PlanError([Problem(("data", "name"), what, " ".join(str(error).split())[:300])])
    if "scripts are no longer supported" in words:
        what = f"{path} is Python code, which is never run"
        return PlanError([Problem(_PATH, what, "try `revision: refs/convert/parquet`")])
    if isinstance(error, DatasetGenerationError | ValueError | OSError):
        return PlanError([Problem(_PATH, f"{path} can't be read: {_first_line(error.__cause__ or error)}")])
    return error


def _first_line(error: BaseException) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "")


@contextmanager
def quietly() -> Iterator[None]:
    """No bars and no log lines: what matters comes as an exception, and is said once."""
    import datasets

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            datasets.enable_progress_bars()
