"""Continuous batching of diffusion steps: the active samples of one group advance by one denoiser call.

New requests join at the next step, ended and cancelled ones leave at it. Nothing here knows of Triton, and nothing
blocks: `_pump` starts what calls can start, and runs again when one ends, when a request comes, and every _TICK_S.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
from typing import Any, Protocol

import numpy as np
from outcomes import Expired, Overloaded, outcome
from settings import Settings
from trajectory import Part, Trajectory, combine, context_rows, state_rows

_TICK_S = 0.1  # how late a time limit or a cancellation may be seen while nothing else happens
_MOST_HELD = 4  # batches whose stacked context is kept, in case the next call is of the same rows

logger = logging.getLogger(__name__)


class Denoiser(Protocol):
    """One velocity evaluation; its exception ends the requests it was called for, and no others."""

    def hold(self, context: np.ndarray) -> Any:
        """The stacked context in the form that velocity() takes: made once, used while a batch stays together."""

    async def velocity(self, path: str, state: dict[str, np.ndarray], context: Any, request_id: str) -> np.ndarray:
        """[R, L, 64] for the R rows of `state` and `context`; `request_id` names the requests they are of."""


class Sink(Protocol):
    """Where a trajectory's progress goes; one for each request."""

    def cancelled(self) -> Exception | None:
        """Why the request should stop now, if it should."""

    def step(self, trajectory: Trajectory) -> None:
        """Called after each step, the last one included."""

    def fail(self, error: Exception) -> None:
        """The end of a request that has no result."""


class Observer(Protocol):
    """What is counted."""

    def load(self, active: int, queued: int) -> None:
        """Samples that are stepped, and that wait."""

    def evaluated(self, path: str, rows: int, seconds: float) -> None:
        """One denoiser call has ended well."""

    def stepped(self, samples: int) -> None:
        """Samples that have come one step further."""

    def ended(self, outcome: str) -> None:
        """A request has ended (outcomes.OUTCOMES)."""


@dataclasses.dataclass
class _Place:
    sink: Sink
    arrived: float


class Stepper:
    """Owns the trajectories in progress and in the queue."""

    def __init__(self, denoiser: Denoiser, settings: Settings, observer: Observer) -> None:
        self._denoiser = denoiser
        self._settings = settings
        self._observer = observer
        self._queue: dict[Trajectory, _Place] = {}
        self._active: dict[Trajectory, _Place] = {}  # in the order of their last step, the oldest first
        self._calls: dict[asyncio.Task[None], tuple[int, int, str]] = {}  # with the group of each
        self._held: collections.OrderedDict[tuple[Part, ...], Any] = collections.OrderedDict()
        self._untold: list[tuple[Trajectory, _Place]] = []  # have come a step further since the last pump
        self._timer: asyncio.TimerHandle | None = None
        self._last_check = 0.0

    @property
    def samples(self) -> int:
        """Samples that are stepped."""
        return sum(trajectory.samples for trajectory in self._active)

    @property
    def queued(self) -> int:
        """Samples that wait for their turn."""
        return sum(trajectory.samples for trajectory in self._queue)

    def submit(self, trajectory: Trajectory, sink: Sink) -> None:
        """Adds a trajectory; it joins the batch at the next step, or waits in the queue until it fits.

        Raises Overloaded when the queue has no room either.
        """
        loop = asyncio.get_running_loop()
        self._queue[trajectory] = _Place(sink, loop.time())
        self._promote()
        if trajectory in self._queue and self.queued > self._settings.max_queued:
            del self._queue[trajectory]
            raise Overloaded(
                f"samples in progress must stay within {self._settings.max_trajectories} and {self._settings.max_queued} queued, "
                f"got {self.samples} and {self.queued} and {trajectory.samples} more\nhint: try again later"
            )
        loop.call_soon(self._pump)  # not at once: requests that came together shall start together

    def _promote(self) -> None:
        """First come, first served; a request of more samples than fit runs when it is alone."""
        for trajectory in list(self._queue):
            if self._active and self.samples + trajectory.samples > self._settings.max_trajectories:
                return
            self._active[trajectory] = self._queue.pop(trajectory)

    def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._last_check >= _TICK_S:
            self._last_check = now
            for trajectory in [*self._queue, *self._active]:
                self._drop_if_over(trajectory, now)
        self._promote()
        while len(self._calls) < self._settings.lanes and (parts := self._next_call(now)):
            task = loop.create_task(self._call(parts))
            self._calls[task] = parts[0].trajectory.group
            task.add_done_callback(self._called)
        for trajectory, place in self._untold:  # after the calls, which then run while answers are sent
            loop.call_soon(self._tell, trajectory, place)
        self._untold.clear()
        self._observer.load(self.samples, self.queued)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(_TICK_S, self._pump) if self._active or self._queue else None

    def _drop_if_over(self, trajectory: Trajectory, now: float) -> bool:
        place = self._queue.get(trajectory) or self._active[trajectory]
        reason, waited = place.sink.cancelled(), now - place.arrived
        if reason is None and waited > self._settings.total_timeout_s:
            reason = _expired("the request must end", "total_timeout_s", self._settings.total_timeout_s)
        if reason is None and trajectory in self._queue and waited > self._settings.queue_timeout_s:
            reason = _expired("the request must begin", "queue_timeout_s", self._settings.queue_timeout_s)
        if reason is not None:
            self._end(trajectory, reason)
        return reason is not None

    def _next_call(self, now: float) -> list[Part]:
        """The samples that have waited longest, and those that can share their call, as many as fit.

        A group that has a call running starts another only if it fills it: what would be a small batch now can join
        the others at their next step.
        """
        groups: dict[tuple[int, int, str], list[Trajectory]] = {}
        for trajectory in self._active:
            if trajectory.waiting:
                groups.setdefault(trajectory.group, []).append(trajectory)
        for group, members in groups.items():
            room = self._room(members[0])
            if group in self._calls.values() and sum(member.waiting for member in members) < room:
                continue
            parts: list[Part] = []
            for member in members:
                if room and not self._drop_if_over(member, now):
                    parts.append(member.take(room))
                    room -= parts[-1].samples
            if parts:
                return parts
        return []

    def _room(self, trajectory: Trajectory) -> int:
        """Samples like this one that one call takes."""
        latent_tokens, context_tokens, _ = trajectory.group
        rows = min(self._settings.max_batch, self._settings.max_tokens_per_step // (latent_tokens + context_tokens))
        return max(1, rows // trajectory.rows_per_sample)

    async def _call(self, parts: list[Part]) -> None:
        begin = asyncio.get_running_loop().time()
        try:
            state = state_rows(parts)
            path, ids = parts[0].trajectory.path, ",".join(part.trajectory.request_id for part in parts)
            output = await self._denoiser.velocity(path, state, self._context(parts), ids)
            self._observer.evaluated(path, len(state["latents"]), asyncio.get_running_loop().time() - begin)
            velocity = combine(parts, output)
        except Exception as error:  # whatever the denoiser raised belongs to these clients and to nobody else
            for part in parts:
                self._end(part.trajectory, error)
            return
        rows = np.split(velocity, np.cumsum([part.samples for part in parts])[:-1])
        for part, values in zip(parts, rows, strict=True):
            part.trajectory.batch = len(velocity)
            self._receive(part, values)

    def _called(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the stepper must not fail, got %r", error)
        self._pump()

    def _context(self, parts: list[Part]) -> Any:
        key = tuple(parts)
        held = self._held.pop(key) if key in self._held else self._denoiser.hold(context_rows(parts))
        self._held[key] = held  # as the newest
        while len(self._held) > _MOST_HELD:
            self._held.popitem(last=False)
        return held

    def _receive(self, part: Part, velocity: np.ndarray) -> None:
        trajectory = part.trajectory
        if trajectory not in self._active:
            return  # it ended while its call ran
        try:
            complete = trajectory.receive(part, velocity)
        except Exception as error:  # one trajectory's end is not its neighbours'
            self._end(trajectory, error)
            return
        if complete:
            place = self._active.pop(trajectory)
            self._observer.stepped(trajectory.samples)
            if trajectory.done:
                self._forget(trajectory)
            else:
                self._active[trajectory] = place  # at the end of the queue
            self._untold.append((trajectory, place))

    def _tell(self, trajectory: Trajectory, place: _Place) -> None:
        if not trajectory.done and trajectory not in self._active:
            return  # it has been told another end
        try:
            place.sink.step(trajectory)
        except Exception as error:
            self._active[trajectory] = place
            self._end(trajectory, error)
            return
        if trajectory.done:
            self._observer.ended("done")

    def _end(self, trajectory: Trajectory, error: Exception) -> None:
        place = self._queue.pop(trajectory, None) or self._active.pop(trajectory, None)
        if place is None:
            return
        self._forget(trajectory)
        self._observer.ended(outcome(error))
        with contextlib.suppress(Exception):  # a client that cannot even be told must not stop the others
            place.sink.fail(error)

    def _forget(self, trajectory: Trajectory) -> None:
        for key in [key for key in self._held if any(part.trajectory is trajectory for part in key)]:
            del self._held[key]


def _expired(what: str, name: str, limit_s: float) -> Expired:
    return Expired(f"{what} within {limit_s:g} s, got no further\nhint: raise {name} in hunyuan3d_sampler's config.pbtxt")
