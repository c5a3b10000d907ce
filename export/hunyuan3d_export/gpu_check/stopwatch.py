"""Times on a device: the median of many calls after warm-up, and the rate of a large matrix product."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch

# On a CPU, where only the code is tested, the fewest calls that give a time.
_WARM_UPS = {"cuda": 3, "cpu": 1}
_FEWEST, _MOST = {"cuda": 5, "cpu": 1}, 50
_MATRIX = {"cuda": 8192, "cpu": 256}
_MIB = 2**20


def wait(device: torch.device) -> None:
    """Returns when the device has finished all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall-clock time for one call, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that torch's allocator held during one call, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    wait(device)
    return torch.cuda.max_memory_allocated(device) / _MIB


def free_mib(device: torch.device) -> float | None:
    """The device's free memory in MiB, as its driver sees it; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] / _MIB if device.type == "cuda" else None


@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """Measures on one device. budget_s: seconds for the timed calls of one measurement, of which there are 5 to 50 on a GPU."""

    device: torch.device
    budget_s: float

    def median_ms(self, run: Callable[[], object]) -> float:
        """The median time of the calls after warm-up. On a GPU, CUDA events take the times."""
        for _ in range(_WARM_UPS[self.device.type] - 1):
            run()
        calls = int(min(max(self.budget_s / seconds(run, self.device), _FEWEST[self.device.type]), _MOST))
        if self.device.type != "cuda":
            return 1000 * statistics.median(seconds(run, self.device) for _ in range(calls))
        with torch.cuda.device(self.device):
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
            for start, end in events:
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large square matrix product, measured once."""
        return _matmul_tflops(self, dtype)


@functools.cache
def _matmul_tflops(stopwatch: Stopwatch, dtype: torch.dtype) -> float:
    size = _MATRIX[stopwatch.device.type]
    left, right = (torch.randn(size, size, device=stopwatch.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / 1e9 / stopwatch.median_ms(lambda: torch.mm(left, right, out=out))
