"""Time and memory of every attention backend at one length, relative to `standard`, beside the claims that need a GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from ..attention import BACKENDS, CHUNK_SIZE, Call, PeakMemory, attention
from .rows import Job, Row, Skip
from .setting import Setting
from .stopwatch import wait

PART = "attention"
HEADS, HEAD_DIM = 16, 64
# The time and the memory at L = 4096 that the description of the attention designs claims, as shares of `standard`.
CLAIMS = {"flash": (0.40, 0.50), "sage": (0.25, 0.40)}
_MIB = 2**20


class AttentionRows:
    """The jobs. `standard` comes first, because the other rows show their shares of its time and memory."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._standard: Row | None = None

    def jobs(self) -> Iterator[Job]:
        for backend in sorted(BACKENDS, key=lambda name: name != "standard"):
            yield Job(PART, self._name(backend), functools.partial(self._measured, backend))

    def _name(self, backend: str) -> str:
        return f"{backend}, L {self._setting.attention_length}, {HEADS} heads of {HEAD_DIM}"

    @torch.inference_mode()
    def _measured(self, backend: str) -> Row:
        device, length = self._setting.device, self._setting.attention_length
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, device=device).to(dtype) for _ in range(3))
        if reason := BACKENDS[backend].refusal(q, k, v, Call(None, None, False, 0.0, CHUNK_SIZE)):
            raise Skip(f"{backend} must get {reason}")
        run = functools.partial(attention, q, k, v, backend=backend)
        run()  # the first call also loads kernels and keeps workspaces, whose memory must not count
        wait(device)
        with PeakMemory(device) as peak:
            run()
            wait(device)
        work = 2 * 2 * length**2 * HEADS * HEAD_DIM
        row = Row(
            part=PART,
            name=self._name(backend),
            time_ms=self._setting.stopwatch.median_ms(run),
            tflop=work / 1e12,
            roofline_ms=work / 1e9 / self._setting.stopwatch.matmul_tflops(dtype),
            memory_mib=None if peak.bytes is None else peak.bytes / _MIB,
            note=_claim(backend),
        )
        return self._compared(backend, row)

    def _compared(self, backend: str, row: Row) -> Row:
        if backend == "standard":
            self._standard = row
        base = self._standard
        if base is None or base is row or not row.time_ms or not base.time_ms:
            return row
        shares = f"time {row.time_ms / base.time_ms:.2f}"
        if row.memory_mib is not None and base.memory_mib:
            shares += f", memory {row.memory_mib / base.memory_mib:.2f} of standard"
        return dataclasses.replace(row, note=f"{shares}{row.note}")


def _claim(backend: str) -> str:
    if backend not in CLAIMS:
        return ""
    time, memory = CLAIMS[backend]
    return f" (claimed: {time:.2f} and {memory:.2f})"
