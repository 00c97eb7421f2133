"""A disk that forgets: what is left of a folder if the power fails, by the least that POSIX promises.

A file is what it was when it was last synced, a folder holds the names that it held when it was last synced, and
whatever was never synced is empty. Real file systems keep more; what survives here survives on them. It watches
`os.fsync` while something saves and fails the power after every call of it; it never harms the folder itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

Entries = dict[str, tuple[int, bool]]
"""Name -> inode, and whether it is a folder."""


@dataclass
class Memory:
    """What is on the disk for sure."""

    root: int
    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, Entries] = field(default_factory=dict)

    def copy(self) -> Memory:
        return Memory(self.root, dict(self.files), dict(self.folders))

    def restore(self, folder: Path, inode: int | None = None) -> Path:
        """Write what is on the disk into a new folder, as a machine finds it after the power is back."""
        folder.mkdir(parents=True)
        for name, (entry, is_folder) in self.folders.get(inode or self.root, {}).items():
            if is_folder:
                self.restore(folder / name, entry)
            else:
                (folder / name).write_bytes(self.files.get(entry, b""))
        return folder


class Disk:
    """Watches what is synced below a folder."""

    def __init__(self, folder: Path):
        self._held: list[int] = []
        self.now = Memory(folder.stat().st_ino)
        self.cuts: list[Memory] = []
        """What a power failure leaves, after each sync."""
        for path in (folder, *folder.rglob("*")):
            self._look(path)

    def _look(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self._note(descriptor)
        finally:
            os.close(descriptor)

    def _note(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._held.append(os.dup(descriptor))  # an inode that is held isn't given to another file
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(descriptor) as entries:
                self.now.folders[found.st_ino] = {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}
        else:
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                self.now.files[found.st_ino] = file.read()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take down what is synced inside `with`, and a memory after each time; the last one is what is left at the
        end."""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._note(descriptor)
            self.cuts.append(self.now.copy())

        try:
            with mock.patch.object(os, "fsync", fsync):
                yield
            self.cuts.append(self.now.copy())
        finally:
            for descriptor in self._held:
                with suppress(OSError):
                    os.close(descriptor)
