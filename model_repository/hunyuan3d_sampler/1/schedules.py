"""Flow times of a trajectory, called sigmas: they rise from 0 (noise) to 1 (data), and a step goes from one to the next."""

from __future__ import annotations

import numpy as np

MAX_STEPS = 1000
_CONSISTENCY_GRID = 100
_TRAINING_TIMES = 1000


def flow_match(steps: int) -> np.ndarray:
    """`steps` times linspace(0, 1), then 1 again: [steps + 1], float64. The last step has size 0, as in upstream."""
    return np.append(np.linspace(0.0, 1.0, steps), 1.0)


def consistency(steps: int) -> np.ndarray:
    """`steps` times of the grid that the turbo weights were distilled on, then 1: [steps + 1], float64."""
    picks = np.floor(np.linspace(0, _CONSISTENCY_GRID, steps, endpoint=False)).astype(int)
    # Grid point j is training time 10 j - 1; the first, which would be -1, is 0.
    times = np.maximum(picks * (_TRAINING_TIMES // _CONSISTENCY_GRID) - 1, 0)
    return np.append(times / (_TRAINING_TIMES - 1), 1.0)


_SCHEDULES = {"flow_match": (flow_match, MAX_STEPS), "consistency": (consistency, _CONSISTENCY_GRID)}
NAMES = tuple(_SCHEDULES)


def sigmas(schedule: str, steps: int) -> np.ndarray:
    """The named schedule's flow times, [steps + 1], float64.

    Raises ValueError for an unknown name or a step count outside 1..1000 (consistency: 1..100).
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(NAMES)}, got {schedule!r}")
    function, most = _SCHEDULES[schedule]
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be in 1..{most} for {schedule}, got {steps}")
    return function(steps)
