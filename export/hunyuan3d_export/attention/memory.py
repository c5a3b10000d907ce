"""The memory of an attention call: an estimate from its shapes, and a measurement while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .function import Call, fused, tracked

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # written to clear_refs, this sets the peak of resident memory back to its present size


def estimate_bytes(backend: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> int:
    """Bytes that one forward pass of the call needs beyond its inputs, at its peak.

    q [B, H, Lq, D], k and v [B, H, Lk, D]; their dtype, device and need of gradients count, and so do bias, mask, causality and
    dropout of the call. bench/attention_estimates.py compares the estimates with measurements on a CPU.
    """
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    stepwise = backend in ("standard", "chunked")
    kernel = not stepwise and fused(q, k, v, call)
    rows = min(call.chunk_size, queries) if backend == "chunked" else queries
    item = q.dtype.itemsize
    scores = batch * heads * rows * keys
    # A fused kernel knows causality by itself, so it needs no added numbers where nothing else is added.
    added = 0 if kernel and not call.terms else _added_numbers(q, k, call, rows) * item
    # The output exists before and after its heads are merged. Where gradients are needed, a mask keeps it a third time, because
    # the queries that see no key are cleared in a copy.
    outputs = (3 if call.mask is not None and tracked(q, k, v, call) else 2) * batch * heads * queries * v.shape[-1] * item
    if stepwise:
        # Scores and weights. Dropout also holds the random factors and their product with the weights.
        return outputs + added + (4 if call.dropout > 0 else 2) * scores * item
    if kernel:
        # A mask holds its added numbers twice for a moment: once more with finite numbers for the queries that see no key.
        packed = batch * heads * keys * (k.shape[-1] + v.shape[-1]) * item if _packs(q) else 0
        return max(outputs + added + packed, 2 * added if call.mask is not None else 0)
    # torch's unfused path computes half precision in float32, from scaled copies of queries and keys. It holds the scores, the
    # weights and one bool for each, or with dropout three matrices of that size.
    wide = max(item, torch.float32.itemsize)
    copies = batch * heads * (queries + keys) * q.shape[-1] * wide
    return outputs + added + copies + (3 * wide if call.dropout > 0 else 2 * wide + torch.bool.itemsize) * scores


def _packs(q: Tensor) -> bool:
    """Whether torch's flash kernel on the CPU copies keys and values into the order that the processor's matrix unit reads."""
    units = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    capabilities: Callable[[], Mapping[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)  # absent from older torch
    return q.device.type == "cpu" and q.dtype in units and bool(capabilities().get(units[q.dtype]))


def _added_numbers(q: Tensor, k: Tensor, call: Call, rows: int) -> int:
    """How many numbers the sum of bias, mask and causality stores for `rows` of the queries, casts to q's dtype included."""
    cast = [term.shape for term in call.terms if term.is_floating_point() and term.dtype != q.dtype]
    shapes = [term.shape for term in call.terms]
    if call.causal:
        shapes.append(torch.Size((q.shape[2], k.shape[2])))
    summed = [] if call.mask is None and not call.causal else [torch.broadcast_shapes(*shapes)]
    return sum(
        math.prod(min(size, rows) if axis == len(shape) - 2 else size for axis, size in enumerate(shape))
        for shape in (*cast, *summed)
    )


class PeakMemory:
    """A context that measures how far memory rises above its level at entry.

    Afterwards `bytes` is that rise, or None where it cannot be measured. On CUDA it is the rise of what torch's allocator holds
    on the device. On the CPU it is the rise of the whole process's resident memory, by Linux's high-water mark: the memory of
    other threads counts too, and memory that the process already held and uses again does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            try:
                _CLEAR_REFS.write_text(_RESET_PEAK)
                self._before = _resident("VmRSS")
            except OSError:  # the system is not Linux, or a sandbox forbids the write
                self._before = None
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        on_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else _resident("VmHWM")
        self.bytes = max(peak - self._before, 0)


def _resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(fields[field].split()[0])
