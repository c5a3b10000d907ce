"""What the commands print, and the exit codes of their errors."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .. import errors

EXIT_CODES: Mapping[type[errors.Hunyuan3DError], int] = {
    errors.InvalidInput: 2,
    errors.ServerUnavailable: 3,
    errors.ModelNotReady: 3,
    errors.Overloaded: 4,
    errors.DeadlineExceeded: 5,
    errors.ModelFailed: 6,
    errors.Cancelled: 130,
}

stdout = Console()
stderr = Console(stderr=True)


def say(text: str) -> None:
    """Prints to stdout as it is: not wrapped, coloured or cut, so that a pipe and a terminal get the same."""
    stdout.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints to stderr as it is."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Report errors as text on stderr and as an exit code, without a traceback."""
    try:
        yield
    except errors.Hunyuan3DError as error:
        warn(f"{type(error).__name__}: {error}")
        raise typer.Exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from error
    except OSError as error:
        warn(f"A file cannot be read or written: {error}\nhint: check the path")
        raise typer.Exit(2) from error


def progress(*more: ProgressColumn) -> Progress:
    """Bars on stderr, if that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, *more, console=stderr, disable=not stderr.is_terminal)


def print_facts(facts: Mapping[str, object], *, as_json: bool) -> None:
    """Prints one line of facts, as text or as JSON."""
    say(json.dumps(facts) if as_json else ", ".join(f"{key} {value}" for key, value in facts.items()))


def report(out: Path, started: float, more: Mapping[str, object], *, as_json: bool) -> None:
    """Prints what a command wrote, and the seconds since `started`."""
    print_facts({"out": str(out), **more, "seconds": round(time.perf_counter() - started, 3)}, as_json=as_json)
