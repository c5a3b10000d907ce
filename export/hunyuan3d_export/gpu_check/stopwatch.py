"""Times on a device: medians of many calls after warm-up, and the rate its matrix products reach."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

_WARM_UPS = 3
_FEWEST, _MOST = 5, 50
_BUDGET_S = 8.0
_MATRIX = {"cuda": 8192, "cpu": 1024}


def wait(device: torch.device) -> None:
    """Returns when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One call, from an idle device to an idle device, by the clock on the wall."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median of 5 to 50 calls, as many as fit a few seconds, after warm-up; by CUDA events on a GPU."""
    for _ in range(_WARM_UPS - 1):
        run()
    calls = int(min(max(_BUDGET_S / seconds(run, device), _FEWEST), _MOST))
    if device.type != "cuda":
        return 1000 * statistics.median(seconds(run, device) for _ in range(calls))
    with torch.cuda.device(device):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


@functools.cache
def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large square matrix product."""
    size = _MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / 1e9 / median_ms(lambda: torch.mm(left, right, out=out), device)
