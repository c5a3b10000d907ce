"""Continuous batching of diffusion steps: the active samples of one group advance together, by one denoiser call a step.

New requests join the batch at its next step, and requests that have ended or were cancelled leave it then. Nothing here knows of
Triton, and nothing blocks: `_pump` starts as many denoiser calls as may run. It runs when a request arrives, when a call ends, and
every _TICK_S while there is work.
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
from sample_request import SamplingPath
from settings import Settings
from trajectory import Group, Part, Progress, Trajectory, combine, context_rows, shares, state_rows

_TICK_S = 0.1  # while nothing else happens, time limits and cancellations are noticed at most this late
CONTEXTS_HELD = 4
_NEWEST = 0.2  # the weight of the newest call in the moving average of its seconds
_LEAST_WAIT_S = 0.1
# While no call runs, a request waits for those that arrive together with it, in shares of a call's seconds.
_APART = 0.1  # since the last arrival
_TOGETHER = 0.3  # since the first one
_LONGEST_CALL_S = 1.0  # a call that takes longer counts as this, because the first call of a server may take very long

logger = logging.getLogger(__name__)


class Denoiser(Protocol):
    """Evaluates velocities. An exception ends the requests of that call and no others."""

    def hold(self, context: np.ndarray) -> Any:
        """The stacked context in the form that velocity() takes. It is used for as long as the batch stays the same."""

    async def velocity(self, path: SamplingPath, state: dict[str, np.ndarray], context: Any, request_id: str) -> np.ndarray:
        """[R, L, 64] for the R rows of `state` and `context`; `request_id` names the requests that the rows belong to."""


class Sink(Protocol):
    """The client's side of one request: it hears of each step and of the end."""

    def cancelled(self) -> Exception | None:
        """The reason to stop the request now, None to go on."""

    def step(self, progress: Progress) -> None:
        """Called after each step, the last one included, whether the step was evaluated or forecast."""

    def fail(self, error: Exception) -> None:
        """Called once when the request ends without a result."""


class Observer(Protocol):
    """Counts events for the metrics."""

    def load(self, active: int, queued: int) -> None:
        """So many samples are being stepped, and so many wait in the queue."""

    def evaluated(self, path: SamplingPath, rows: int, seconds: float) -> None:
        """One denoiser call has returned."""

    def stepped(self, samples: int, forecast: int) -> None:
        """Samples have completed so many steps in all; the velocity of so many of these was forecast."""

    def forecast_error(self, error: float) -> None:
        """A sample with a tolerance is done, with this mean error of its forecast velocities."""

    def begun(self, seconds: float) -> None:
        """A request that arrived so long ago is stepped from now on."""

    def first_step(self, seconds: float) -> None:
        """A request that arrived so long ago has been told of its first step."""

    def done(self, seconds: float) -> None:
        """A request that arrived so long ago has its result."""

    def ended(self, outcome: str) -> None:
        """A request has ended; `outcome` is one of outcomes.OUTCOMES."""


@dataclasses.dataclass
class _Place:
    sink: Sink
    arrived: float
    failed: bool = False
    told: bool = False


class Stepper:
    """Owns the trajectories in progress and in the queue.

    contexts_held: for how many batches the stacked context is kept, in case the next call of their group has the same rows.
    """

    def __init__(
        self, denoiser: Denoiser, settings: Settings, observer: Observer, *, contexts_held: int = CONTEXTS_HELD
    ) -> None:
        self._denoiser = denoiser
        self._settings = settings
        self._observer = observer
        self._queue: dict[Trajectory, _Place] = {}
        self._active: dict[Trajectory, _Place] = {}  # those whose last step is longest ago come first
        self._calls: dict[asyncio.Task[None], Group] = {}  # the running denoiser calls
        self._contexts_held = contexts_held
        self._held: collections.OrderedDict[tuple[Part, ...], Any] = collections.OrderedDict()  # the last used at the end
        self._untold: list[tuple[Trajectory, _Place, Progress]] = []  # steps that are done and that no client has been told
        self._timer: asyncio.TimerHandle | None = None
        self._gathering: asyncio.TimerHandle | None = None
        self._first_arrival = 0.0  # of the requests that are being gathered
        self._last_check = 0.0
        self._call_s = 0.0  # seconds of a denoiser call, averaged
        self._sample_s = 0.0  # seconds of a denoiser call for each of its samples, averaged

    @property
    def samples(self) -> int:
        """How many samples are being stepped."""
        return sum(trajectory.samples for trajectory in self._active)

    @property
    def queued(self) -> int:
        """How many samples wait in the queue."""
        return sum(trajectory.samples for trajectory in self._queue)

    def submit(self, trajectory: Trajectory, sink: Sink) -> None:
        """Adds a trajectory: it joins a batch at the next step if it may be active now, and waits in the queue otherwise.

        Raises Overloaded when the queue is full.
        """
        loop = asyncio.get_running_loop()
        self._queue[trajectory] = _Place(sink, loop.time())
        self._promote()
        if trajectory in self._queue and self.queued > self._settings.max_queued:
            del self._queue[trajectory]
            raise Overloaded(
                f"samples in progress must stay within {self._settings.max_trajectories} and {self._settings.max_queued} queued, "
                f"got {self.samples} and {self.queued} and {trajectory.samples} more\nhint: try again {self._when_one_ends()}"
            )
        if self._calls:
            loop.call_soon(self._pump)
        else:
            self._gather()

    def _gather(self) -> None:
        """Starts the first call a little later, so that requests that arrive together start together."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._gathering is None:
            self._first_arrival = now
        else:
            self._gathering.cancel()
        call_s = min(self._call_s, _LONGEST_CALL_S)
        self._gathering = loop.call_at(min(now + _APART * call_s, self._first_arrival + _TOGETHER * call_s), self._pump)

    def _when_one_ends(self) -> str:
        """About when the next trajectory is done, if all samples in progress take turns and each step is evaluated."""
        if not self._sample_s or not self._active:
            return "later"
        steps = min(trajectory.total - trajectory.step for trajectory in self._active)
        return f"in {max(_LEAST_WAIT_S, steps * self.samples * self._sample_s / self._settings.lanes):.1f} s"

    def _promote(self) -> None:
        """Moves requests from the queue, first come, first served; one with too many samples must wait until it can run alone."""
        for trajectory in list(self._queue):
            if self._active and self.samples + trajectory.samples > self._settings.max_trajectories:
                return
            place = self._active[trajectory] = self._queue.pop(trajectory)
            self._observer.begun(asyncio.get_running_loop().time() - place.arrived)

    def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if now - self._last_check >= _TICK_S:
            self._last_check = now
            for trajectory in [*self._queue, *self._active]:
                self._end_if_due(trajectory, now)
        self._promote()
        while len(self._calls) < self._settings.lanes and (parts := self._next_call(now)):
            task = loop.create_task(self._call(parts))
            self._calls[task] = parts[0].trajectory.group
            task.add_done_callback(self._called)
        for untold in self._untold:  # after the next calls have begun: they run while answers are sent
            loop.call_soon(self._tell, *untold)
        self._untold.clear()
        self._observer.load(self.samples, self.queued)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(_TICK_S, self._pump) if self._active or self._queue else None

    def _end_if_due(self, trajectory: Trajectory, now: float) -> bool:
        """Ends a trajectory that was cancelled or has used up its time; whether it did."""
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
        """The samples that have waited longest, with as many others of their group as fit into the call.

        A group that has a call running starts a second one only if it can fill it: the few samples that wait will share a
        larger call with the others at the next step.
        """
        groups: dict[Group, list[Trajectory]] = {}
        for trajectory in self._active:
            if trajectory.waiting:
                groups.setdefault(trajectory.group, []).append(trajectory)
        for group, members in groups.items():
            room = self._room(members[0])
            if group in self._calls.values() and sum(member.waiting for member in members) < room:
                continue
            parts: list[Part] = []
            for member in members:
                if room and not self._end_if_due(member, now):
                    parts.append(member.take(room))
                    room -= parts[-1].samples
            if parts:
                return parts
        return []

    def _room(self, trajectory: Trajectory) -> int:
        """How many samples of this trajectory's group fit into one call."""
        latent_tokens, context_tokens, _ = trajectory.group
        rows = min(self._settings.max_batch, self._settings.max_tokens_per_step // (latent_tokens + context_tokens))
        return max(1, rows // trajectory.rows_per_sample)

    async def _call(self, parts: list[Part]) -> None:
        begin = asyncio.get_running_loop().time()
        try:
            state = state_rows(parts)
            path, ids = parts[0].trajectory.path, ",".join(part.trajectory.request_id for part in parts)
            output = await self._denoiser.velocity(path, state, self._context(parts), ids)
            seconds = asyncio.get_running_loop().time() - begin
            self._observer.evaluated(path, len(state["latents"]), seconds)
            velocity = combine(parts, output)
            newest = _NEWEST if self._call_s else 1
            self._call_s += newest * (seconds - self._call_s)
            self._sample_s += newest * (seconds / len(velocity) - self._sample_s)
            rows = shares(parts, velocity)
        except Exception as error:  # the requests of this call end, and all others go on
            for part in parts:
                self._end(part.trajectory, error)
            return
        steps: list[Progress] = []
        for part, values in rows:
            part.trajectory.batch = len(velocity)
            steps += self._receive(part, values)
        # Once for all samples, because each count of a metric takes 20 us and the next call waits for this method.
        if steps:
            forecast = sum(progress.forecast for progress in steps)
            self._observer.stepped(sum(progress.evaluated for progress in steps) + forecast, forecast)

    def _called(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the stepper has failed, which is a defect: %r", error)
        self._pump()

    def _context(self, parts: list[Part]) -> Any:
        key = tuple(parts)
        held = self._held.pop(key) if key in self._held else self._denoiser.hold(context_rows(parts))
        self._held[key] = held
        while len(self._held) > self._contexts_held:
            self._held.popitem(last=False)
        return held

    def _receive(self, part: Part, velocity: np.ndarray) -> list[Progress]:
        """The steps that the velocity of a part completes."""
        trajectory = part.trajectory
        if trajectory not in self._active:
            return []  # the trajectory was ended while its call ran
        try:
            steps = trajectory.receive(part, velocity)
        except Exception as error:  # this trajectory ends, and those that shared the call go on
            self._end(trajectory, error)
            return []
        if not steps:
            return []
        place = self._active.pop(trajectory)
        if trajectory.done:
            self._forget(trajectory)
        else:
            self._active[trajectory] = place  # behind those that have waited longer
        self._untold += [(trajectory, place, progress) for progress in steps]
        return steps

    def _tell(self, trajectory: Trajectory, place: _Place, progress: Progress) -> None:
        if place.failed:
            return  # the trajectory was ended, and its client has been told so
        try:
            place.sink.step(progress)
        except Exception as error:
            self._active[trajectory] = place
            self._end(trajectory, error)
            return
        waited = asyncio.get_running_loop().time() - place.arrived
        if not place.told:
            place.told = True
            self._observer.first_step(waited)
        if progress.done:
            self._observer.done(waited)
            if trajectory.request.tolerance:
                for error in progress.forecast_errors:
                    self._observer.forecast_error(error)
            self._observer.ended("done")

    def _end(self, trajectory: Trajectory, error: Exception) -> None:
        place = self._queue.pop(trajectory, None) or self._active.pop(trajectory, None)
        if place is None:
            return
        place.failed = True
        self._forget(trajectory)
        self._observer.ended(outcome(error))
        with contextlib.suppress(Exception):  # a client that cannot be reached must not stop the others
            place.sink.fail(error)

    def _forget(self, trajectory: Trajectory) -> None:
        for key in [key for key in self._held if any(part.trajectory is trajectory for part in key)]:
            del self._held[key]


def _expired(what: str, name: str, limit_s: float) -> Expired:
    return Expired(f"{what} within {limit_s:g} s, got no further\nhint: raise {name} in hunyuan3d_sampler's config.pbtxt")
