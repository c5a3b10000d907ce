"""Times on a device: the median of many calls after warm-up, and the rate of a large matrix product."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch

_WARM_UPS, _FEWEST, _MOST = 3, 5, 50
_MATRIX = {"cuda": 8192, "cpu": 256}
_MATMUL_S = 0.05  # the least time for the products; a single cold one would be slow
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


def lost_mib(before: float | None, device: torch.device) -> float | None:
    """The memory in MiB that the device has lost since free_mib returned `before`; None on a CPU."""
    free = free_mib(device)
    return None if free is None or before is None else before - free


@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """Measures on one device.

    budget_s: seconds for the timed calls of one measurement, of which a GPU makes 5 to 50. A CPU makes 1 to 50 and no other
    calls, because there only the code is tested.
    """

    device: torch.device
    budget_s: float

    def median_ms(self, run: Callable[[], object]) -> float:
        """The median time of the calls after warm-up. On a GPU, CUDA events take the times."""
        if self.device.type != "cuda":
            return 1000 * statistics.median(self._seconds_on_cpu(run))
        for _ in range(_WARM_UPS - 1):
            run()
        calls = int(min(max(self.budget_s / seconds(run, self.device), _FEWEST), _MOST))
        with torch.cuda.device(self.device):
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
            for start, end in events:
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def _seconds_on_cpu(self, run: Callable[[], object]) -> list[float]:
        times = [seconds(run, self.device)]
        while len(times) < _MOST and sum(times) < self.budget_s:
            times.append(seconds(run, self.device))
        return times

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large square matrix product, measured once."""
        return _matmul_tflops(self, dtype)


@functools.cache
def _matmul_tflops(stopwatch: Stopwatch, dtype: torch.dtype) -> float:
    size = _MATRIX[stopwatch.device.type]
    left, right = (torch.randn(size, size, device=stopwatch.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    stopwatch = dataclasses.replace(stopwatch, budget_s=max(stopwatch.budget_s, _MATMUL_S))
    return 2 * size**3 / 1e9 / stopwatch.median_ms(lambda: torch.mm(left, right, out=out))
