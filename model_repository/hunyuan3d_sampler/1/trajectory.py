"""One request from its arrival to its latents: it is decoded and checked, then stepped. Knows nothing of Triton.

The states may be CuPy arrays (arrays.py): NumPy's functions take them too, and then work on the GPU.

Axes: B samples of the request, L latent tokens, T context tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import schedules
from finite import all_finite
from forecast import Forecast, off_reason
from outcomes import Ended, NoDenoiser
from settings import Settings

CHANNELS = 64
# The largest sizes that the denoisers are made for. Without a bound, a request of 30 MB could ask for a terabyte of noise.
MOST_LATENTS, MOST_CONTEXT = 4096, 5480

# How the velocities of a sample are evaluated: one branch; both branches in one graph; both as two batch rows; or a
# guidance-distilled network's single evaluation.
SamplingPath = Literal["plain", "guided", "two-batch", "distilled"]
PATHS: tuple[SamplingPath, ...] = get_args(SamplingPath)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A checked request: latents [B, L, 64] float32 are the initial noise; negative_context None stands for zeros.

    off_reason says why a tolerance that the client gave has no effect; the tolerance here is then 0.
    """

    context: np.ndarray
    negative_context: np.ndarray | None
    latents: np.ndarray
    sigmas: np.ndarray
    guidance_scale: float
    preview_every: int
    tolerance: float = 0.0
    off_reason: str | None = None


def decode(tensors: Mapping[str, np.ndarray], settings: Settings, default_num_latents: int | None) -> SampleRequest:
    """The request in `tensors`, which may lack the optional ones: the deployed defaults take their places.

    Raises ValueError, which names the tensor, for anything that the sampler cannot do.
    """
    if "context" not in tensors:  # Triton only counts inputs: it accepts an optional one in place of the required one
        raise ValueError("context must be given, got none")
    context = _tokens(tensors, "context", MOST_CONTEXT)
    if len(context) > settings.largest_request:
        raise ValueError(f"context must be of at most {settings.largest_request} samples, got {len(context)}")
    negative = _tokens(tensors, "negative_context", MOST_CONTEXT) if "negative_context" in tensors else None
    if negative is not None and negative.shape != context.shape:
        raise ValueError(f"negative_context must have context's shape {list(context.shape)}, got {list(negative.shape)}")
    if negative is not None and settings.guidance_embed:
        raise ValueError("negative_context must be left out for guidance-distilled weights, got one")
    schedule = _scalar(tensors, "schedule", settings.schedule.encode()).decode(errors="replace")
    sigmas = schedules.sigmas(schedule, int(_scalar(tensors, "steps", settings.steps)))
    scale = float(_scalar(tensors, "guidance_scale", settings.guidance_scale))
    if not np.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")
    preview_every = int(_scalar(tensors, "preview_every", 0))
    if preview_every < 0:
        raise ValueError(f"preview_every must be 0 or more, got {preview_every}")
    tolerance = float(_scalar(tensors, "tolerance", 0.0))
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance:g}")
    off = off_reason(schedule, sigmas) if tolerance else None
    return SampleRequest(
        context=context,
        negative_context=negative,
        latents=_initial_latents(tensors, len(context), default_num_latents),
        sigmas=sigmas,
        guidance_scale=scale,
        preview_every=preview_every,
        tolerance=0.0 if off else tolerance,
        off_reason=off,
    )


def noise(seeds: np.ndarray, num_latents: int) -> np.ndarray:
    """N(0, 1) of shape [B, L, 64], float32: row i is drawn from NumPy's Philox with the key seeds[i], whatever the other rows are."""
    rows = [
        np.random.Generator(np.random.Philox(key=int(seed) % 2**64)).standard_normal((num_latents, CHANNELS), dtype=np.float32)
        for seed in seeds
    ]
    return np.stack(rows)


def _initial_latents(tensors: Mapping[str, np.ndarray], batch: int, default_num_latents: int | None) -> np.ndarray:
    if "latents" in tensors:
        latents = _tokens(tensors, "latents", MOST_LATENTS)
        if len(latents) != batch:
            raise ValueError(f"latents must have context's batch size {batch}, got {len(latents)}")
        if "num_latents" in tensors and int(_scalar(tensors, "num_latents", 0)) != latents.shape[1]:
            raise ValueError(f"num_latents must be left out or equal latents' {latents.shape[1]}, got {tensors['num_latents']}")
        return latents.astype(np.float32, copy=True)
    num_latents = _scalar(tensors, "num_latents", default_num_latents)
    if num_latents is None or not 1 <= int(num_latents) <= MOST_LATENTS:
        raise ValueError(f"num_latents must be in 1..{MOST_LATENTS}, got {num_latents}")
    seeds = tensors.get("seed", np.zeros(1, np.int64))
    if seeds.shape == (1,):
        seeds = seeds + np.arange(batch)
    if seeds.shape != (batch,):
        raise ValueError(f"seed must hold 1 or {batch} values, got shape {list(seeds.shape)}")
    return noise(seeds, int(num_latents))


def _tokens(tensors: Mapping[str, np.ndarray], name: str, most: int) -> np.ndarray:
    value = tensors[name]
    if value.ndim != 3 or 0 in value.shape or value.shape[1] > most:
        raise ValueError(f"{name} must be [batch, 1..{most} tokens, channels], got shape {list(value.shape)}")
    if not all_finite(value):
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    return value


def _scalar(tensors: Mapping[str, np.ndarray], name: str, default: object) -> object:
    if name not in tensors:
        return default
    if tensors[name].shape != (1,):
        raise ValueError(f"{name} must hold one value, got shape {list(tensors[name].shape)}")
    return tensors[name][0]


def choose_path(request: SampleRequest, settings: Settings, *, plain_ready: bool, guided_ready: bool) -> SamplingPath:
    """How this request's velocities are evaluated with the denoisers that are loaded.

    Raises NoDenoiser when none of them can evaluate it.
    """
    wanted: list[SamplingPath]
    if settings.guidance_embed:
        wanted = ["distilled"] if plain_ready else []
    elif request.negative_context is not None:
        wanted = ["two-batch"] if plain_ready else []
    elif request.guidance_scale == 1.0:  # the unconditional velocity cancels, so both graphs give the same
        wanted = [*(["plain"] if plain_ready else []), *(["guided"] if guided_ready else [])]
    else:
        wanted = [*(["guided"] if guided_ready else []), *(["two-batch"] if plain_ready else [])]
    if not wanted:
        raise NoDenoiser("a denoiser for this request must be loaded, found none\nhint: deploy the plain graph")
    return wanted[0]


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

    evaluated, forecast: for how many samples the step's velocity was evaluated, and for how many it was forecast; both are 0 for
    a step of size 0, which needs no velocity. batch: samples of the last denoiser call, those of other requests included.
    evaluations and forecast_errors hold a number for each sample.
    """

    step: int
    total: int
    t: float
    latents: np.ndarray
    path: SamplingPath
    batch: int
    context_tokens: int
    preview_due: bool
    evaluated: int
    forecast: int
    evaluations: tuple[int, ...]
    forecast_errors: tuple[float, ...]

    @property
    def samples(self) -> int:
        return len(self.latents)

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
        self.latents = request.latents
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
            self.latents, velocity = self._with_forecasts(dict(zip(evaluated, velocity, strict=True)))
        self.latents = self.latents + np.float32(sigmas[self.step + 1] - sigmas[self.step]) * velocity
        self.step += 1
        self._evaluations += 1
        if not np.isfinite(self.latents).all():
            raise FloatingPointError(f"latents must stay finite, got NaN or Inf at step {self.step} of {self.total}")
        steps = [self._progress(evaluated=len(evaluated), forecast=self.samples - len(evaluated))]
        while not self.done and sigmas[self.step + 1] == sigmas[self.step]:
            self.step += 1
            steps.append(self._progress(evaluated=0, forecast=0))
        nexts = [forecast.next for forecast in self._forecasts] or [self.step] * self.samples
        self._waiting = [index for index, step in enumerate(nexts) if step == self.step]
        self._missing = len(self._waiting)
        return steps

    def _with_forecasts(self, evaluated: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The corrected state and the velocity of all samples: evaluated where there is a velocity, otherwise forecast."""
        states, velocities = [], []
        for index, (forecast, state) in enumerate(zip(self._forecasts, self.latents, strict=True)):
            if index in evaluated:
                state, velocity = forecast.receive(self.step, state, evaluated[index])
            else:
                velocity = forecast.velocity(self.step, state)
            states.append(state)
            velocities.append(velocity)
        return np.stack(states), np.stack(velocities)

    def _progress(self, *, evaluated: int, forecast: int) -> Progress:
        every = self.request.preview_every
        return Progress(
            step=self.step,
            total=self.total,
            t=self.t,
            latents=self.latents,
            path=self.path,
            batch=self.batch,
            context_tokens=self.request.context.shape[1],
            preview_due=self.done or (every > 0 and self.step % every == 0),
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
