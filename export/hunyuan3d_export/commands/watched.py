"""Shows on stderr how a long command goes: a bar on a terminal; elsewhere a line for each finished part, and one every few seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from . import options
from .options import EXIT_INTERRUPTED

SIGN_S = 5.0  # the longest time without a line where there is no terminal
_LEAST_SHARE = 0.05  # of the work that must be done before the time left is worth saying


class Watched:
    """A progress.ComparisonWatch. `unit` is the word for its parts: checks, prompts. It counts and formats; a subclass shows."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._begun = time.monotonic()
        self._parts, self._work, self._done_work = 0, 0.0, 0.0
        self._now = "starting"
        self.finished: list[str] = []
        self.files: list[Path] = []

    def plan(self, parts: int, work: float) -> None:
        self._parts, self._work = self._parts + parts, self._work + work
        self._changed()

    def begin(self, name: str) -> None:
        self._now = name
        self._changed()

    def advance(self, work: float) -> None:
        self._done_work += work
        self._changed()

    def finish(self, line: str) -> None:
        self.finished.append(line)
        self._finished(line)

    def wrote(self, path: Path) -> None:
        self.files.append(path)

    @property
    def interrupted(self) -> str:
        return f"interrupted: {len(self.finished)} of {self._parts} {self._unit} were finished"

    @property
    def state(self) -> str:
        """How much is done, the time since the beginning, and the time left at the speed until now."""
        since_s = time.monotonic() - self._begun
        share = self._done_work / self._work if self._work else 0.0
        left = f", {_clock(since_s * (1 - share) / share)} left" if _LEAST_SHARE < share < 1 else ""
        return f"{len(self.finished)}/{self._parts} {self._unit}, {_clock(since_s)}{left}"

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None: ...

    def _changed(self) -> None: ...

    def _finished(self, line: str) -> None: ...


class _Lines(Watched):
    """A thread of its own says every SIGN_S seconds what runs, because one evaluation may take longer."""

    def __enter__(self) -> Watched:
        self._said = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._over.wait(SIGN_S / 10):
            if time.monotonic() - self._said >= SIGN_S:
                self._say(f"{self._now}: {self.state}")

    def _finished(self, line: str) -> None:
        self._say(f"{line} ({self.state})")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        _print(f"{self._title}: {text}")


class _Bar(Watched):
    def __enter__(self) -> Watched:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(12), _State(self)
        self._progress = Progress(*columns, console=options.errors, transient=True)
        self._task = self._progress.add_task(self._title, total=None)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _changed(self) -> None:
        self._progress.update(self._task, description=self._now, completed=self._done_work, total=self._work or None)


class _State(TextColumn):
    def __init__(self, watched: Watched) -> None:
        super().__init__("")
        self._watched = watched

    def render(self, _task: object) -> Text:
        return Text(self._watched.state)


@contextlib.contextmanager
def watched(title: str, unit: str) -> Iterator[Watched]:
    """Shows the progress of what runs inside. After Ctrl-C it says what was finished, and the command ends with code 130."""
    kind = _Bar if options.errors.is_terminal else _Lines
    watch = kind(title, unit)
    try:
        with watch:
            yield watch
    except KeyboardInterrupt:
        if kind is _Bar:
            for line in watch.finished:
                _print(line)
        for path in watch.files:
            _print(f"receipt: {path}")
        _print(watch.interrupted)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _print(text: str) -> None:
    options.errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
