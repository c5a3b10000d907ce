"""Work that would hold the event loop up, on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from .errors import DeadlineExceeded

R = TypeVar("R")
# Arrays up to here are checked and cast on the event loop: a thread would cost about as much. v2-0's context has 4.2 MB.
_SMALL_BYTES = 5 << 20


def is_small(*values: Any) -> bool:
    """Whether the values are arrays of NumPy that take about a millisecond to check and cast. Lists and GPU arrays are not."""
    given = [value for value in values if value is not None]
    return all(isinstance(value, np.ndarray) for value in given) and sum(value.nbytes for value in given) <= _SMALL_BYTES


async def in_thread(work: Callable[[], R], *, timeout_s: float) -> R:
    """The result of `work()`, which runs on a thread. Raises DeadlineExceeded if it takes longer; the thread then goes on."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(work), timeout_s)
    except asyncio.TimeoutError as error:
        message = "the arguments were not ready to be sent within timeout_s\nhint: raise timeout_s, or pass float16 and files"
        raise DeadlineExceeded(message) from error
