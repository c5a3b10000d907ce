"""One step of tiny samples on every path, made while the sampler loads.

CuPy compiles each kernel when it is first used. Without a rehearsal the first request would make the event loop wait for the
compiler, and with the loop every other request.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from sample_request import CHANNELS, PATHS, SampleRequest
from schedules import flow_match
from trajectory import Trajectory, combine, context_rows, shares, state_rows

if TYPE_CHECKING:
    from arrays import Arrays

_LATENTS, _CONTEXT, _CONTEXT_WIDTH = 3, 2, 1536
_FORECAST_STEPS, _ROUNDING = 10, 1e-4


def rehearse(arrays: Arrays) -> None:
    """Steps a sample of its own and a request of two samples, which takes two calls: the first is shared, the second is not.

    Raises whatever the array library raises, and RuntimeError when it computes another result than NumPy.
    """
    for path in PATHS:
        one, two = (Trajectory(arrays.upload(_request(samples)), path) for samples in (1, 2))
        for parts in ([one.take(1), two.take(1)], [two.take(1)]):
            state, context = state_rows(parts), context_rows(parts)
            for name, array in {**state, "context": context}.items():
                arrays.array(arrays.tensor(name, array))
            for part, velocity in shares(parts, combine(parts, np.zeros_like(state["latents"]) + np.float32(2))):
                part.trajectory.receive(part, velocity)
        for trajectory in (one, two):
            found = arrays.host(trajectory.latents)
            if not (found == 1).all():
                raise RuntimeError(f"latents must be 1 after the rehearsal of {path}, got {found.min()} to {found.max()}")
    _rehearse_forecasts(arrays)


def _rehearse_forecasts(arrays: Arrays) -> None:
    """A request of two samples whose velocity is 1 at each evaluation, and so at each forecast."""
    request = dataclasses.replace(_request(2), sigmas=flow_match(_FORECAST_STEPS), tolerance=0.5)
    trajectory, calls = Trajectory(arrays.upload(request), "plain"), 0
    while not trajectory.done:
        part, calls = trajectory.take(2), calls + 1
        trajectory.receive(part, np.zeros_like(trajectory.latents) + np.float32(1))
    found = arrays.host(trajectory.latents)
    if calls >= _FORECAST_STEPS - 1 or not (abs(found - 1) < _ROUNDING).all():
        raise RuntimeError(f"latents must be 1 after forecasts, got {found.min()} to {found.max()} after {calls} evaluations")


def _request(samples: int) -> SampleRequest:
    """A request whose latents are 0 and whose first step has size 0.5. Only a request of one sample has a negative context."""
    context = np.zeros((samples, _CONTEXT, _CONTEXT_WIDTH), np.float16)
    return SampleRequest(
        context=context,
        negative_context=context if samples == 1 else None,
        latents=np.zeros((samples, _LATENTS, CHANNELS), np.float32),
        sigmas=np.array([0.0, 0.5, 1.0]),
        guidance_scale=3.0,
        preview_every=0,
    )
