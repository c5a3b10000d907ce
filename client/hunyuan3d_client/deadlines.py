"""The time that is left of a timeout, for calls that consist of several steps."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_S = 1e-3  # the timeout of a step whose time is up already; gRPC then answers DEADLINE_EXCEEDED


def until(timeout_s: float) -> Callable[[], float]:
    """A function that says how many seconds are left of `timeout_s` seconds from now, and at least LEAST_S."""
    deadline = time.monotonic() + timeout_s
    return lambda: max(LEAST_S, deadline - time.monotonic())
