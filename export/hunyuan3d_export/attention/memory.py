"""The memory of an attention call: an estimate from its shapes, and a measurement while it runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # written to clear_refs, this sets the peak of resident memory back to its present size


def estimate_bytes(backend: str, q: Tensor, k: Tensor, *, chunk_size: int) -> int:
    """Bytes that one forward pass needs beyond its inputs.

    q [B, H, Lq, D], k [B, H, Lk, D]. The output exists twice, before and after its heads are merged. `standard` holds the
    scores and the weights of all queries, `chunked` those of chunk_size queries, and fused kernels hold none.
    """
    batch, heads, queries, head_dim = q.shape
    rows = {"standard": queries, "chunked": min(chunk_size, queries)}.get(backend, 0)
    return batch * heads * (2 * queries * head_dim + 2 * rows * k.shape[-2]) * q.element_size()


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
