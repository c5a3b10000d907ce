"""The steps of one request, from its initial noise to its latents. Knows nothing of Triton.

The states may be CuPy arrays (arrays.py): NumPy's functions take them too, and then work on the GPU.

Axes: B samples of the request, L latent tokens, T context tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from forecast import Forecast
from outcomes import Ended
from sample_request import SampleRequest, SamplingPath

Group = tuple[int, int, SamplingPath]


@dataclasses.dataclass(frozen=True)
class Part:
    """The samples of a trajectory, by their indices, that are its share of one denoiser call."""

    trajectory: Trajectory
    indices: tuple[int, ...]

    @property
    def samples(self) -> int:
        return len(self.indices)

    @property
    def slice(self) -> slice | list[int]:
        """Selects these samples from an array [B, ...]: a slice, which copies nothing, if they lie side by side."""
        start, end = self.indices[0], self.indices[-1] + 1
        return slice(start, end) if end - start == len(self.indices) else list(self.indices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A trajectory right after one of its steps, for its client.

    latents: the state, where a preview is due or the request is done; None at other steps.
    evaluated, forecast: for how many samples the step's velocity was evaluated, and for how many it was forecast; both are 0 for
    a step of size 0, which needs no velocity. batch: samples of the last denoiser call, those of other requests included.
    evaluations and forecast_errors hold a number for each sample.
    """

    step: int
    total: int
    t: float
    latents: np.ndarray | None
    path: SamplingPath
    samples: int
    batch: int
    context_tokens: int
    evaluated: int
    forecast: int
    evaluations: tuple[int, ...]
    forecast_errors: tuple[float, ...]

    @property
    def done(self) -> bool:
        return self.step >= self.total


class Trajectory:
    """The state of one request between steps. All its samples are at the same step; a step may take several denoiser calls.

    With a tolerance each sample decides for itself which steps need no evaluation (forecast.py). A step that no sample needs
    evaluated follows at once upon the step before it.
    """

    def __init__(self, request: SampleRequest, path: SamplingPath, request_id: str = "") -> None:
        self.request = request
        self.path = path
        self.request_id = request_id
        self.latents = request.latents  # the state at the present step; inside a gap it may be an earlier step's state
        self.step = 0
        self.batch = 0  # samples of the last denoiser call, those of other requests included
        self._forecasts = [Forecast(request.sigmas, request.tolerance) for _ in self.latents] if request.tolerance else []
        self._evaluations = 0  # of each sample, without forecasts
        self._waiting = list(range(self.samples))  # samples to evaluate in this step that are not yet part of a denoiser call
        self._missing = self.samples  # samples to evaluate in this step whose velocity has not come
        self._velocities: dict[tuple[int, ...], np.ndarray] = {}  # the indices of a part -> its velocity

    @property
    def samples(self) -> int:
        return len(self.latents)

    @property
    def waiting(self) -> int:
        """How many samples are not yet part of a denoiser call of this step."""
        return len(self._waiting)

    @property
    def rows_per_sample(self) -> int:
        return 2 if self.path == "two-batch" else 1

    @property
    def total(self) -> int:
        return len(self.request.sigmas) - 1

    @property
    def t(self) -> float:
        return float(self.request.sigmas[self.step])

    @property
    def done(self) -> bool:
        return self.step >= self.total

    @property
    def group(self) -> Group:
        """(L, T, path). Trajectories of one group can share a denoiser call, whatever their times, scales and schedules."""
        return (self.latents.shape[1], self.request.context.shape[1], self.path)

    def take(self, most: int) -> Part:
        """The next samples to evaluate in this step, at most `most`."""
        part = Part(self, tuple(self._waiting[:most]))
        del self._waiting[:most]
        return part

    def receive(self, part: Part, velocity: np.ndarray) -> list[Progress]:
        """Takes the velocity [samples, L, 64] of one part. Returns the steps that are now done: none while parts are missing.

        Raises FloatingPointError when the state is no longer finite.
        """
        self._velocities[part.indices] = velocity
        self._missing -= part.samples
        if self._missing:
            return []
        parts = [self._velocities[indices] for indices in sorted(self._velocities)]
        evaluated = sorted(index for indices in self._velocities for index in indices)
        self._velocities.clear()
        steps = self._advance(parts[0] if len(parts) == 1 else np.concatenate(parts), evaluated)
        while not self.done and not self._missing:
            steps += self._advance(np.zeros_like(self.latents[:0]), [])
        return steps

    def _advance(self, velocity: np.ndarray, evaluated: list[int]) -> list[Progress]:
        """One Euler step in float32, and the steps of size 0 behind it, such as flow_match's last, which change nothing."""
        sigmas = self.request.sigmas
        if self._forecasts:
            for index, row in zip(evaluated, velocity, strict=True):
                self._forecasts[index].receive(self.latents[index], row)
        else:
            self._set(self.latents + np.float32(sigmas[self.step + 1] - sigmas[self.step]) * velocity, self.step + 1)
        self._evaluations += 1
        first = self.step = self.step + 1
        while not self.done and sigmas[self.step + 1] == sigmas[self.step]:
            self.step += 1
        nexts = [forecast.next for forecast in self._forecasts] or [self.step] * self.samples
        self._waiting = [index for index, step in enumerate(nexts) if step == self.step]
        self._missing = len(self._waiting)
        steps = range(first, self.step + 1)
        if self._forecasts and (self._waiting or any(map(self._shown, steps))):
            self._set(np.stack([forecast.state(first) for forecast in self._forecasts]), first)
        counts = [(len(evaluated), self.samples - len(evaluated)), *[(0, 0)] * (len(steps) - 1)]
        return [self._progress(step, *count) for step, count in zip(steps, counts, strict=True)]

    def _set(self, latents: np.ndarray, step: int) -> None:
        if not np.isfinite(latents).all():
            raise FloatingPointError(f"latents must stay finite, got NaN or Inf at step {step} of {self.total}")
        self.latents = latents

    def _shown(self, step: int) -> bool:
        """Whether the client gets the state of a step."""
        return step >= self.total or (self.request.preview_every > 0 and step % self.request.preview_every == 0)

    def _progress(self, step: int, evaluated: int, forecast: int) -> Progress:
        return Progress(
            step=step,
            total=self.total,
            t=float(self.request.sigmas[step]),
            latents=self.latents if self._shown(step) else None,
            path=self.path,
            samples=self.samples,
            batch=self.batch,
            context_tokens=self.request.context.shape[1],
            evaluated=evaluated,
            forecast=forecast,
            evaluations=tuple(one.evaluations for one in self._forecasts) or (self._evaluations,) * self.samples,
            forecast_errors=tuple(one.error for one in self._forecasts) or (0.0,) * self.samples,
        )


def context_rows(parts: Sequence[Part]) -> np.ndarray:
    """The context of one denoiser call, [R, T, 1536], which stays the same from step to step.

    The path two-batch has the negative contexts behind the others.
    """
    own = [part.trajectory.request.context[part.slice] for part in parts]
    if parts[0].trajectory.path != "two-batch":
        return _stacked(own)
    negatives = [part.trajectory.request.negative_context for part in parts]
    zeros = zip(parts, negatives, own, strict=True)
    return _stacked([*own, *(np.zeros_like(c) if n is None else n[part.slice] for part, n, c in zeros)])


def state_rows(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """The other tensors of one denoiser call, for parts of one group.

    The path two-batch has all rows twice: first for the conditional branch, then for the unconditional one.
    """
    path = parts[0].trajectory.path
    latents = _stacked([part.trajectory.latents[part.slice] for part in parts])
    t = _rows(parts, [part.trajectory.t for part in parts])
    if path == "two-batch":
        return {"latents": np.concatenate([latents, latents]), "t": np.concatenate([t, t])}
    extra = {"guided": {"guidance_scale": _scales(parts)}, "distilled": {"guidance": _scales(parts)}, "plain": {}}[path]
    return {"latents": latents, "t": t, **extra}


def combine(parts: Sequence[Part], output: np.ndarray) -> np.ndarray:
    """The denoiser's output -> velocity [R, L, 64]. Only the path two-batch has two branches to combine.

    Raises Ended for an output of another shape.
    """
    trajectory = parts[0].trajectory
    rows = trajectory.rows_per_sample * sum(part.samples for part in parts)
    if output.shape != (rows, *trajectory.latents.shape[1:]):
        raise Ended(f"velocity must be {[rows, *trajectory.latents.shape[1:]]}, got {list(output.shape)}")
    if trajectory.path != "two-batch":
        return output
    conditional, unconditional = np.split(output, 2)
    return unconditional + _scales(parts)[:, :, None] * (conditional - unconditional)


def shares(parts: Sequence[Part], velocity: np.ndarray) -> list[tuple[Part, np.ndarray]]:
    """Each part with its own rows of the velocity [R, L, 64]."""
    ends = np.cumsum([part.samples for part in parts]).tolist()
    return list(zip(parts, np.split(velocity, ends[:-1]), strict=True))


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _scales(parts: Sequence[Part]) -> np.ndarray:
    return _rows(parts, [part.trajectory.request.guidance_scale for part in parts])


def _rows(parts: Sequence[Part], values: list[float]) -> np.ndarray:
    """A value for each part -> the same value for each of its samples, [R, 1] float32, on the device of the latents."""
    column = np.asarray(values, np.float32, like=parts[0].trajectory.latents)
    return np.repeat(column, [part.samples for part in parts])[:, None]
