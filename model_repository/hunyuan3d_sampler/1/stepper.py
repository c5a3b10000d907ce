"""Continuous batching of diffusion steps: all active trajectories of one group advance by one denoiser call.

New ones join at the next step, ended and cancelled ones leave at it. One asyncio task does all the stepping.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Protocol

import numpy as np
from trajectory import Trajectory, combine, denoiser_inputs

Denoise = Callable[[str, dict[str, np.ndarray]], Awaitable[np.ndarray]]


class Sink(Protocol):
    """Where a trajectory's progress goes; one for each request."""

    def cancelled(self) -> Exception | None:
        """Why the request should stop now, if it should."""

    def step(self, trajectory: Trajectory) -> None:
        """Called after each step, the last one included."""

    def fail(self, error: Exception) -> None:
        """The end of a request that has no result."""


class Stepper:
    """Owns the trajectories in progress.

    denoise(path, tensors) evaluates one batch of at most max_batch rows; its exception ends the group it was called for.
    """

    def __init__(self, denoise: Denoise, *, max_batch: int) -> None:
        self._denoise = denoise
        self._max_batch = max_batch
        self._active: dict[Trajectory, Sink] = {}  # in the order of their last step, the oldest first
        self._task: asyncio.Task[None] | None = None

    @property
    def samples(self) -> int:
        """Samples in progress, over all trajectories."""
        return sum(len(trajectory.latents) for trajectory in self._active)

    def submit(self, trajectory: Trajectory, sink: Sink) -> None:
        """Adds a trajectory; it joins the batch at the next step."""
        self._active[trajectory] = sink
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._active:
            self._drop_cancelled()
            group = self._next_group()
            if group:
                await self._step(group)

    def _drop_cancelled(self) -> None:
        for trajectory, sink in list(self._active.items()):
            if (reason := sink.cancelled()) is not None:
                self._end(trajectory, reason)

    def _next_group(self) -> list[Trajectory]:
        """The trajectory that has waited longest, and those that can share its call, as many as fit."""
        members: list[Trajectory] = []
        rows = 0
        for trajectory in self._active:
            if members and trajectory.group != members[0].group:
                continue
            rows += self._rows(trajectory)
            if members and rows > self._max_batch:
                break
            members.append(trajectory)
        return members

    def _rows(self, trajectory: Trajectory) -> int:
        return len(trajectory.latents) * (2 if trajectory.path == "two-batch" else 1)

    async def _step(self, group: list[Trajectory]) -> None:
        try:
            velocity = combine(group, await self._evaluate(group[0].path, denoiser_inputs(group)))
        except Exception as error:  # whatever the denoiser raised belongs to this group's clients and to nobody else
            for trajectory in group:
                self._end(trajectory, error)
            return
        start = 0
        for trajectory in group:
            stop = start + len(trajectory.latents)
            self._advance(trajectory, velocity[start:stop])
            start = stop

    async def _evaluate(self, path: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """One call, or as many as a request of more samples than fit needs."""
        rows = len(tensors["latents"])
        if rows <= self._max_batch:
            return await self._denoise(path, tensors)
        bounds = [*range(0, rows, self._max_batch), rows]
        slices = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        parts = [await self._denoise(path, {name: value[part] for name, value in tensors.items()}) for part in slices]
        return np.concatenate(parts)

    def _advance(self, trajectory: Trajectory, velocity: np.ndarray) -> None:
        sink = self._active[trajectory]
        try:
            trajectory.advance(velocity)
            sink.step(trajectory)
        except Exception as error:  # one trajectory's end is not its neighbours'
            self._end(trajectory, error)
            return
        del self._active[trajectory]
        if not trajectory.done:
            self._active[trajectory] = sink  # at the end of the queue

    def _end(self, trajectory: Trajectory, error: Exception) -> None:
        with contextlib.suppress(Exception):  # a client that cannot even be told must not stop the others
            self._active.pop(trajectory).fail(error)
