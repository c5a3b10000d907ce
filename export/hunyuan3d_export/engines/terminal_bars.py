"""Shows the phases of a TensorRT build as bars on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class TerminalBars:
    """progress.Bars, drawn by rich. The bars disappear when the build is over."""

    def __init__(self, title: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._title = title
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TerminalBars:
        self._progress.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, phase: str, indent: str, steps: int) -> None:
        self._tasks[phase] = self._progress.add_task(f"{self._title}: {indent}{phase}", total=steps)

    def step(self, phase: str, done: int) -> None:
        self._progress.update(self._tasks[phase], completed=done)

    def finish(self, phase: str) -> None:
        self._progress.remove_task(self._tasks.pop(phase))
