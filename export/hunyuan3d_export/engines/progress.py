"""Watches a TensorRT build: shows a bar for each of the builder's phases, and stops the build at its next step after Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from .api import TensorRT

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)


class Bars(Protocol):
    """Shows the phases of a build."""

    def start(self, phase: str, indent: str, steps: int) -> None:
        """A phase begins."""

    def step(self, phase: str, done: int) -> None:
        """`done` steps of the phase are over."""

    def finish(self, phase: str) -> None:
        """The phase is over."""


@dataclasses.dataclass(frozen=True)
class BuildWatch:
    """The monitor that a build passes to its config. cancelled: whether Ctrl-C was pressed."""

    monitor: tensorrt.IProgressMonitor
    _cancel: threading.Event

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()


@contextlib.contextmanager
def watched(trt: TensorRT, title: str) -> Iterator[BuildWatch]:
    """Inside this context, SIGINT asks the builder to stop, because KeyboardInterrupt must not pass through its C++ frames."""
    cancel = threading.Event()
    with _bars(title) as bars, _on_interrupt(cancel):
        yield BuildWatch(_monitor(trt, bars, cancel), cancel)


def _monitor(trt: TensorRT, bars: Bars, cancel: threading.Event) -> tensorrt.IProgressMonitor:
    if TYPE_CHECKING:
        from tensorrt import IProgressMonitor
    else:
        IProgressMonitor = trt.IProgressMonitor

    class Monitor(IProgressMonitor):
        def __init__(self) -> None:
            IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bars.start(phase_name, "  " if parent_phase else "", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bars.step(phase_name, step + 1)
            return not cancel.is_set()

        def phase_finish(self, phase_name: str) -> None:
            bars.finish(phase_name)

    return Monitor()


@contextlib.contextmanager
def _bars(title: str) -> Iterator[Bars]:
    try:
        from .terminal_bars import TerminalBars
    except ImportError:  # a machine for gpu-check may lack rich
        yield _LoggedPhases(title)
        return
    with TerminalBars(title) as bars:
        yield bars


class _LoggedPhases:
    """Bars for a machine without rich: the outer phases become lines of the log."""

    def __init__(self, title: str) -> None:
        self._title = title

    def start(self, phase: str, indent: str, steps: int) -> None:
        if not indent:
            logger.info("%s: %s, %d steps", self._title, phase, steps)

    def step(self, phase: str, done: int) -> None:
        pass

    def finish(self, phase: str) -> None:
        pass


@contextlib.contextmanager
def _on_interrupt(event: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        event.set()

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
