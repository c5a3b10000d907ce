"""Segments whose request failed or whose client died. The server is in this process (conftest.py)."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract, shared_memory

pytestmark = [
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is Linux's"),
    pytest.mark.usefixtures("prefix"),
]
FOLDER = Path("/dev/shm")
LATENTS = np.arange(3072 * 64, dtype=np.float32).reshape(1, 3072, 64)


def context(length: int = 300) -> np.ndarray:
    return np.ones((1, length, contract.CONTEXT_WIDTH), np.float16)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def segments(prefix: str) -> list[Path]:
    return list(FOLDER.glob(f"{prefix}*"))


def sent_by_value(request: Any) -> set[str]:
    return {tensor.name for tensor in request.inputs if "shared_memory_region" not in tensor.parameters}


def test_a_segment_that_the_server_may_still_use_is_left_to_it(kserve: Any, prefix: str) -> None:
    with h.Client(kserve.url, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context())
        kserve.stall.clear()
        with pytest.raises(h.DeadlineExceeded):
            client.denoise(LATENTS, 0.5, context(), timeout_s=0.2)
        assert len(kserve.segments) == 1 and not segments(prefix)
        kserve.stall.set()
        client.denoise(LATENTS, 0.5, context())
        assert kserve.registrations == 2 and len(segments(prefix)) == 1
    assert len(kserve.segments) == 1, "left for a later look"


def test_leaving_a_stream_leaves_its_segment(kserve: Any, prefix: str) -> None:
    kserve.hold_after = 2
    with h.Client(kserve.url, shared_memory="auto") as client:
        for step in client.stream(context(), steps=3):
            if step.index == 2:
                break
        until(lambda: not segments(prefix))
    assert len(kserve.segments) == 1


def test_what_nobody_owns_is_unregistered_after_a_while(kserve: Any, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbour = shared_memory.Segment(1 << 20)  # owned, because this process has locked it
    for name in (f"{prefix}left", neighbour.name, "someone's"):
        kserve.segments[name] = mmap.mmap(-1, 1 << 20)
    monkeypatch.setattr(shared_memory, "_SWEEP_S", 0.05)
    with h.Client(kserve.url, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context())
        until(lambda: f"{prefix}left" not in kserve.segments)
        client.denoise(LATENTS, 0.5, context())
        assert {neighbour.name, "someone's"} < kserve.segments.keys() and len(kserve.segments) == 3
        assert kserve.registrations == 1, "the client's own idle segment is owned"
    neighbour.leave()


def test_a_new_segment_taken_for_a_dead_ones_is_not_used(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    lock = shared_memory.fcntl.flock

    def late(file: int, kind: int) -> None:
        """Another client looks at the segment's file after the file was made and before it is locked."""
        monkeypatch.setattr(shared_memory.fcntl, "flock", lock)
        (path,) = segments(prefix)
        assert not shared_memory._is_owned(path, or_unlink=True) and not path.exists()
        lock(file, kind)

    monkeypatch.setattr(shared_memory.fcntl, "flock", late)
    with pytest.raises(OSError, match="took the new segment for a dead one's"):
        shared_memory.Segment(1 << 20)


def test_memory_left_to_the_server_counts(kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MOST_BYTES", 4 << 20)
    with h.Client(kserve.url, shared_memory="auto") as client:
        kserve.stall.clear()
        with pytest.raises(h.DeadlineExceeded):
            client.denoise(LATENTS, 0.5, context(), timeout_s=0.2)
        kserve.stall.set()
        client.denoise(LATENTS, 0.5, context())
    assert sent_by_value(kserve.requests[-1]) == {"latents", "t", "context"}


KILLED = """
import sys, numpy as np, hunyuan3d_client as h
from hunyuan3d_client import shared_memory
shared_memory._PREFIX = sys.argv[2]
client = h.Client(sys.argv[1], shared_memory="auto")
client.denoise(np.ones((1, 3072, 64)), 0.5, np.ones((1, 300, 1536), np.float16))
print("done", flush=True)
client.denoise(np.ones((1, 3072, 64)), 0.5, np.ones((1, 300, 1536), np.float16))
"""


def test_nothing_is_left_after_kill_9_and_a_restart(kserve: Any, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", KILLED, kserve.url, prefix]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "done\n"
        kserve.stall.clear()  # the second call gets no answer, so it cannot end before the kill
        process.send_signal(signal.SIGKILL)
        process.wait()
    kserve.stall.set()
    assert len(segments(prefix)) == 1, "the dead client's"
    (dead,) = kserve.segments
    monkeypatch.setattr(shared_memory, "_SWEEP_S", 0.05)
    with h.Client(kserve.url, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context())
        assert len(segments(prefix)) == 1 and dead not in {path.name for path in segments(prefix)}
        until(lambda: dead not in kserve.segments)
    assert not kserve.segments and not segments(prefix)


FORGOTTEN = KILLED[: KILLED.index("print")]


def test_nothing_is_left_by_a_process_that_forgets_to_close(kserve: Any, prefix: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", FORGOTTEN, kserve.url, prefix], check=True, timeout=60)
    assert kserve.registrations == 1 and not kserve.segments and not segments(prefix)


def test_closing_while_a_call_is_in_flight(kserve: Any, background: Any) -> None:
    kserve.stall.clear()
    client = h.Client(kserve.url, shared_memory="auto")
    job = background(client, context(), steps=2)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(h.Cancelled):
        job.result(timeout_s=10)
    client.close()
