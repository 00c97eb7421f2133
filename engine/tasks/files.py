"""Pictures and recordings as a data set keeps them: the bytes themselves, or the path of the file that holds them.

Reads files that a data set names and nothing else; what the bytes mean is known to `pictures` and `sounds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ENVIRONMENT, Problem, RunError
from engine.tasks.base import Table

if TYPE_CHECKING:
    import pyarrow

File = Mapping[str, Any]
"""`{"bytes": ..., "path": ...}`, one of which may be None: what `datasets` makes of an undecoded picture or sound."""


class UnreadableError(RunError):
    """One picture or recording can't be decoded; the sentence says which and why."""

    def __init__(self, sentence: str):
        super().__init__(sentence, ENVIRONMENT)


def content(value: File) -> bytes:
    """The bytes of a file. Raises `UnreadableError`."""
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise UnreadableError(f"{name(value)} can't be read: {error.strerror or error}") from error


def name(value: File) -> str:
    """How a user is told of a file: its folder and its own name, for files of several classes share names."""
    return "/".join(Path(value["path"]).parts[-2:]) if value.get("path") else "a row without a file name"


def not_files(table: Table, column: str, what: str) -> Problem | None:
    """The problem of a column that doesn't hold files; `what` says what they should be: pictures, recordings."""
    import pyarrow as pa

    kind: pyarrow.DataType = table.columns[column].type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return None
    advice = "name a folder of files; a metadata.csv in it with the column `file_name` may say more of each"
    return Problem(("data", "columns", column), f"{table.name}: `{column}` holds {kind} values, not {what}", advice)
