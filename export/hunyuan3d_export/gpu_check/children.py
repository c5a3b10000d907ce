"""Runs each group in a process of its own, so that a CUDA error, a crash or a hang ends no rows but its own.

The processes are forked from a server that has imported torch but has not touched the GPU, so that each starts at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from .groups import Group, groups
from .rows import Job, Row
from .setting import Setting

_PRELOADED = "hunyuan3d_export.gpu_check.groups"
# What a process sends after its last row: it has run all jobs, or its CUDA context is broken and the rest needs another process.
_DONE, _BROKEN = "done", "broken"


def start_server() -> None:
    """Lets the server import the packages in good time. Call it once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOADED])


def rows_of(group: Group, setting: Setting, *, deadline: float, limit: str) -> Iterator[Row]:
    """One row for each of the group's jobs. deadline: the time (monotonic) at which the group's process is killed.

    limit: the words that say which limit has passed. A job whose process died is a failed row, and the jobs after it get a new process.
    """
    left = list(group.jobs)
    while left and time.monotonic() < deadline:
        yield from _one_process(group.name, left, setting, deadline)
    for job in left:
        yield job.skipped(limit)


def _one_process(group: str, left: list[Job], setting: Setting, deadline: float) -> Iterator[Row]:
    """Yields rows and takes their jobs from the head of `left`, until the process ends or the deadline passes."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(group, [job.name for job in left], setting, sender))
    try:
        process.start()
        sender.close()  # the process has its own end; with this one open, its death would not be seen
        while left:
            if not receiver.poll(max(deadline - time.monotonic(), 0)):
                return
            message = receiver.recv()
            if not isinstance(message, Row):
                return
            left.pop(0)
            yield message
    except EOFError:
        process.join()
        yield left.pop(0).failed(f"its process ended with {_how(process)}")
    finally:
        _end(process)
        receiver.close()


def _how(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(process: BaseProcess) -> None:
    """Kills the process with all that it has started, such as a tritonserver; a process that has ended is left alone."""
    if process.pid is None:
        return
    try:
        process.join(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _work(group: str, names: list[str], setting: Setting, sender: Connection) -> None:
    """Runs in the process: measures the named jobs of the group in their order."""
    os.setsid()  # a process group of its own, which _end can kill as a whole
    tempfile.tempdir = str(setting.work)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if setting.device.type == "cpu":
        torch.set_num_threads(1)  # more are slower on a busy machine, and on a CPU only the code is tested
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that each import torch
    (jobs,) = (each.jobs for each in groups(setting) if each.name == group)
    for job in jobs:
        if job.name in names:
            row = job.measured()
            sender.send(row)
            if row.failed and not _works(setting.device):
                sender.send(_BROKEN)
                return
    sender.send(_DONE)


def _works(device: torch.device) -> bool:
    """Whether the device still computes. After a CUDA error, every further call of the same process fails."""
    try:
        return bool(torch.ones(1, device=device).sum().item() == 1)
    except Exception:
        return False
