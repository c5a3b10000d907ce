"""The ledger of a batch: a line of JSON for each result or failure, from which a later run knows what is done."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import invalid

if sys.platform != "win32":
    import fcntl


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one input. `error` is None where `output`, a path inside the batch's folder, was written whole."""

    name: str
    output: str
    digest: str
    options: Mapping[str, Any]
    seconds: float
    request_id: str
    attempts: int
    error: Mapping[str, str] | None = None

    def is_of(self, digest: str, options: Mapping[str, Any], output: str) -> bool:
        """Whether this is a result of these input bytes under these options, in a file of that name."""
        same = (self.digest, dict(self.options), self.output) == (digest, dict(options), output)
        return self.error is None and same


class Ledger:
    """The file that one run appends to, locked while it is open. Each shard of a batch has a file of its own.

    Raises InvalidInput if another run holds the lock, OSError.
    """

    def __init__(self, folder: Path, shard: str = "") -> None:
        self._path = folder / f"ledger{shard and '-'}{shard}.jsonl"

    def __enter__(self) -> Ledger:
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            if sys.platform != "win32":
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise invalid(
                "out",
                "written by one run at a time",
                f"{self._path}, which another run holds",
                "wait for it, or give each run a shard",
            ) from error
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # the run before was killed within a line, which stays unreadable
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def add(self, entry: Entry) -> None:
        """Append an entry, in one write."""
        os.write(self._file, json.dumps(dataclasses.asdict(entry)).encode() + b"\n")
        os.fsync(self._file)


def entries(folder: Path) -> dict[str, Entry]:
    """The last result of each name, or else a failure, from the ledgers of all shards. Lines that were cut short are passed over."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob("ledger*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if entry.error is None or entry.name not in found:
                found[entry.name] = entry
    return found
