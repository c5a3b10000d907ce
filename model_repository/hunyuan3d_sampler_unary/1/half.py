"""Inputs that came in float32 in place of float16, such as `context_fp32` in place of `context`. Knows nothing of Triton.

Triton takes no FP16 in JSON, and it compares each input's dtype with the config before a model sees the request. So a caller who
has only JSON sends an input of another name, and this file casts it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

FLOAT32_TWIN = "_fp32"
REQUIRED = "context"


def cast(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float16 array of each float32 twin, under the name of the input that it stands for.

    NaN and infinity stay what they are, for the sampler to refuse. Raises ValueError for a finite value outside float16's range.
    """
    found = {}
    for name, array in tensors.items():
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float16)
        if np.isinf(narrow).sum() > np.isinf(array).sum():
            most = np.abs(array[np.isfinite(array)]).max()
            raise ValueError(
                f"{name} must be within float16's range of 65504, got magnitude {most:g}\nhint: scale the tokens down"
            )
        found[name.removesuffix(FLOAT32_TWIN)] = narrow
    return found


def twins(names: Collection[str], declared: Collection[str] = (REQUIRED,)) -> list[str]:
    """The names that belong to float32 twins. declared: all inputs that the model has.

    Raises ValueError when an input was given in both types, or when the model's context was given in neither.
    """
    found = [name for name in names if name.endswith(FLOAT32_TWIN)]
    for name in found:
        if name.removesuffix(FLOAT32_TWIN) in names:
            raise ValueError(
                f"{name} must be left out beside {name.removesuffix(FLOAT32_TWIN)}, got both\nhint: send one of the two"
            )
    if REQUIRED in declared and not {REQUIRED, REQUIRED + FLOAT32_TWIN} & set(names):
        raise ValueError(
            f"{REQUIRED} or {REQUIRED + FLOAT32_TWIN} must be given, got neither\nhint: send the tokens of an encoder"
        )
    return found
