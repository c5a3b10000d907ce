"""The time of each part of the demo."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.table import Table

from .options import console


class Clock:
    """Measures the time of the demo's parts, and prints the table at the end."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        console.print(f"[bold]{name}[/bold]")
        start = time.monotonic()
        yield
        self._rows.append((name, time.monotonic() - start))

    def print(self) -> None:
        table = Table("part", "seconds")
        for name, seconds in [*self._rows, ("in all", sum(seconds for _, seconds in self._rows))]:
            table.add_row(name, f"{seconds:.1f}")
        console.print(table)
