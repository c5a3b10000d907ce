"""The file store: pictures and meshes in one folder, each whole or not at all, by names that no caller chooses."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path

from hunyuan3d_client.files import naming_a_full_disk

NAME = re.compile(r"([0-9a-f]{32})(-[0-9]|)\.(png|glb|obj|stl|ply)")
_ORPHAN_S = 3600.0


class Store:
    """Blocking; call it on a thread. Gateways that share a database share the folder too."""

    def __init__(self, folder: Path, *, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, and onto the disk. Raises OSError."""
        path = self.path(name)
        partial = path.with_name(f".{name}.{secrets.token_hex(6)}.partial")  # another thread may write the same file
        try:
            with naming_a_full_disk(path):
                with partial.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        return self.path(name).read_bytes()

    def path(self, name: str) -> Path:
        """The path of a file, whose name must be one of those that jobs.py makes."""
        if not NAME.fullmatch(name):
            raise ValueError(f"name must be a job's id and an ending, got {name!r}")
        return self.folder / name

    def remove(self, names: list[str]) -> None:
        """Remove those of the files that exist."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(entry.stat().st_size for entry in self._entries())

    def fits(self, size_bytes: int) -> bool:
        """Whether so many bytes more are within the bound."""
        return self.size_bytes() + size_bytes <= self.most_bytes

    def old_ids(self) -> dict[str, list[Path]]:
        """Job id -> its files, of files that have not changed for an hour. Half-written files of that age have the id ""."""
        found: dict[str, list[Path]] = {}
        before = time.time() - _ORPHAN_S
        for entry in self._entries():
            if entry.stat().st_mtime < before:
                match = NAME.fullmatch(entry.name)
                found.setdefault(match[1] if match else "", []).append(Path(entry.path))
        return found

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            return [entry for entry in entries if _is_there(entry)]


def _is_there(entry: os.DirEntry[str]) -> bool:
    """Whether a file is still there: another thread or gateway may have removed it since the folder was read."""
    try:
        entry.stat()
    except FileNotFoundError:
        return False
    return entry.is_file()
