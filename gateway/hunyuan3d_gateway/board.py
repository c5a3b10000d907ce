"""How far the jobs of this gateway are, in memory: callers here see every step, and the database gets the latest now and then."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from .jobs import Progress


class Board:
    """Progress by job id. Watchers wait for the next change of a job."""

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._changed: set[str] = set()
        self._changes: dict[str, asyncio.Event] = {}
        self._ends: dict[str, asyncio.Event] = {}

    def get(self, id: str) -> Progress | None:
        """The progress of a job that runs here."""
        return self._progress.get(id)

    def update(self, id: str, **changes: Any) -> None:
        """Change a job's progress and wake whoever watches it."""
        before = self._progress.get(id, Progress())
        self._progress[id] = dataclasses.replace(before, **changes, revision=before.revision + 1)
        self._changed.add(id)
        _set(self._changes, id)

    def drop(self, id: str) -> None:
        """Forget a job that has ended here, and wake whoever waits for it."""
        self._progress.pop(id, None)
        self._changed.discard(id)
        self.wake(id)

    def wake(self, id: str) -> None:
        """Wake whoever watches a job or waits for its end."""
        _set(self._changes, id)
        _set(self._ends, id)

    async def change(self, id: str, timeout_s: float) -> None:
        """Wait for the next change of a job, at most so long."""
        await _wait(self._changes, id, timeout_s)

    async def end(self, id: str, timeout_s: float) -> None:
        """Wait for the end of a job here, at most so long."""
        await _wait(self._ends, id, timeout_s)

    def take_changes(self) -> dict[str, Progress]:
        """The progress that has changed since the last call, without previews, which only watchers here see."""
        found = {id: dataclasses.replace(self._progress[id], preview="") for id in self._changed if id in self._progress}
        self._changed.clear()
        return found


def _set(events: dict[str, asyncio.Event], id: str) -> None:
    if (event := events.pop(id, None)) is not None:
        event.set()


async def _wait(events: dict[str, asyncio.Event], id: str, timeout_s: float) -> None:
    event = events.setdefault(id, asyncio.Event())
    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # Python 3.10 has two classes
        await asyncio.wait_for(event.wait(), timeout_s)
