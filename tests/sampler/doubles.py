"""Stand-ins for the stepper's neighbours: a denoiser that is a formula, clients and observers that record calls."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from parameters import parse
from sample_request import SampleRequest, SamplingPath
from settings import Settings
from stepper import CONTEXTS_HELD, Stepper
from trajectory import Progress, Trajectory

PARAMETERS = {
    "steps": "50",
    "guidance_scale": "5",
    "schedule": "flow_match",
    "guidance_embed": "false",
    "max_batch": "8",
    "max_tokens_per_step": "1000",
    "max_trajectories": "64",
    "max_queued": "16",
    "largest_request": "80",
    "preview_mib": "512",
    "lanes": "1",
    "queue_timeout_s": "60",
    "total_timeout_s": "600",
    "evaluation_timeout_s": "30",
    "arrays": "numpy",
    "restart_denoiser": "true",
}


@dataclasses.dataclass
class Recorder:
    """A sink that records every call."""

    steps: list[int] = dataclasses.field(default_factory=list)
    batches: list[int] = dataclasses.field(default_factory=list)
    evaluated: list[int] = dataclasses.field(default_factory=list)
    last: Progress | None = None
    final: np.ndarray | None = None
    error: Exception | None = None
    gone: bool = False
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def cancelled(self) -> Exception | None:
        return RuntimeError("gone") if self.gone else None

    def step(self, progress: Progress) -> None:
        assert not self.ended.is_set()
        self.steps.append(progress.step)
        self.batches.append(progress.batch)
        self.evaluated.append(progress.evaluated)
        if progress.done:
            self.last, self.final = progress, progress.latents
            self.ended.set()

    def fail(self, error: Exception) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()


class Denoiser:
    """A denoiser that answers velocity = t - latents, or what `bad` returns.

    It records its calls as (path, rows, L). `at[n]` runs during the n-th call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.request_ids: list[str] = []
        self.held = 0
        self.running = self.most_running = 0
        self.at: dict[int, Callable[[], None]] = {}
        self.bad: Callable[[dict[str, np.ndarray]], np.ndarray | None] = lambda _tensors: None

    def hold(self, context: np.ndarray) -> np.ndarray:
        self.held += 1
        return context

    async def velocity(
        self, path: SamplingPath, state: dict[str, np.ndarray], context: np.ndarray, request_id: str
    ) -> np.ndarray:
        self.request_ids.append(request_id)
        tensors = {**state, "context": context}
        rows, length = tensors["latents"].shape[:2]
        assert {len(value) for value in tensors.values()} == {rows} and tensors["t"].shape == (rows, 1)
        self.calls.append((path, rows, length))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        self.at.pop(len(self.calls), lambda: None)()
        answer = self.bad(tensors)
        return tensors["t"][:, :, None] - tensors["latents"] if answer is None else answer

    @property
    def rows(self) -> list[int]:
        return [rows for _, rows, _ in self.calls]


class Counts:
    """An observer that adds up the numbers that it gets."""

    def __init__(self) -> None:
        self.active = self.queued = self.steps = self.forecast = 0
        self.errors: list[float] = []
        self.rows: list[tuple[str, int]] = []
        self.outcomes: list[str] = []
        self.begun_s: list[float] = []
        self.first_step_s: list[float] = []
        self.done_s: list[float] = []

    def begun(self, seconds: float) -> None:
        self.begun_s.append(seconds)

    def first_step(self, seconds: float) -> None:
        self.first_step_s.append(seconds)

    def done(self, seconds: float) -> None:
        self.done_s.append(seconds)

    def load(self, active: int, queued: int) -> None:
        self.active, self.queued = active, queued

    def evaluated(self, path: str, rows: int, seconds: float) -> None:
        assert seconds >= 0
        self.rows.append((path, rows))

    def stepped(self, samples: int, forecast: int) -> None:
        self.steps += samples
        self.forecast += forecast

    def forecast_error(self, error: float) -> None:
        self.errors.append(error)

    def ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)


def make_stepper(
    denoiser: Denoiser, counts: Counts | None = None, *, contexts_held: int = CONTEXTS_HELD, **limits: object
) -> Stepper:
    """A Stepper with the settings of PARAMETERS, except for `limits`."""
    settings = dataclasses.replace(parse(Settings, PARAMETERS), **limits)
    return Stepper(denoiser, settings, counts or Counts(), contexts_held=contexts_held)


def expected(request: SampleRequest) -> np.ndarray:
    """The final latents of a request that is evaluated by the formula of `Denoiser`."""
    state = request.latents
    for now, later in zip(request.sigmas[:-1], request.sigmas[1:], strict=True):
        state = state + np.float32(later - now) * (np.float32(now) - state)
    return state


async def run_together(stepper: Stepper, requests: Sequence[SampleRequest], path: SamplingPath = "guided") -> list[Recorder]:
    """Submits the requests at the same time and waits until all have ended."""
    sinks = [Recorder() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        stepper.submit(Trajectory(request, path), sink)
    await asyncio.gather(*(sink.ended.wait() for sink in sinks))
    return sinks
