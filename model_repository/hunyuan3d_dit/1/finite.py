"""Whether an array holds only finite numbers, quickly also for half precision."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

_ALL_BUT_THE_SIGN = 0x7FFF
_INFINITY = 0x7C00  # the bits of float16's infinity; those of every NaN are larger


def all_finite(array: Any, library: ModuleType = np) -> bool:
    """Whether no element of a non-empty array is NaN or infinite; `library` is the array's own module, numpy or torch.

    float16 is compared by its bits, because isfinite takes about ten times as long for it.
    """
    if array.dtype == library.float16:
        return bool((array.view(library.int16) & _ALL_BUT_THE_SIGN).max() < _INFINITY)
    return bool(library.isfinite(array).all())
