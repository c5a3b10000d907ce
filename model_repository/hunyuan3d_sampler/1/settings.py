"""The sampler's parameters in config.pbtxt."""

from __future__ import annotations

import dataclasses

import schedules

ARRAYS = ("numpy", "auto")
# max_batch: two-batch guidance needs two rows for one sample.
_LEAST = {
    "max_batch": 2,
    "max_tokens_per_step": 1,
    "max_trajectories": 1,
    "max_queued": 0,
    "largest_request": 1,
    "preview_mib": 0,
    "lanes": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A request's defaults are steps, guidance_scale and schedule. guidance_embed: the weights are guidance-distilled.

    A denoiser call takes at most max_batch rows and max_tokens_per_step tokens (rows x (L + T)), but always one sample.
    lanes: how many calls may run at the same time, as many as the denoiser has instances. evaluation_timeout_s: a call that
    takes longer has failed. max_trajectories samples are stepped; max_queued more may wait, each at most queue_timeout_s. A request
    has at most largest_request samples. Previews of all requests in progress take at most preview_mib: steps beyond come without one.
    total_timeout_s: how long a request may take from its arrival to its end. arrays: where the states of samples live, numpy
    or auto, which is CuPy if it can make a step on a GPU. restart_denoiser: whether a denoiser that fails even the smallest evaluation is
    loaded again, because its process has probably died.

    Raises ValueError for a value outside its range.
    """

    steps: int
    guidance_scale: float
    schedule: str
    guidance_embed: bool
    max_batch: int
    max_tokens_per_step: int
    max_trajectories: int
    max_queued: int
    largest_request: int
    preview_mib: int
    lanes: int
    queue_timeout_s: float
    total_timeout_s: float
    evaluation_timeout_s: float
    arrays: str
    restart_denoiser: bool

    def __post_init__(self) -> None:
        schedules.sigmas(self.schedule, self.steps)
        if self.arrays not in ARRAYS:
            raise ValueError(f"arrays must be {' or '.join(ARRAYS)}, got {self.arrays!r}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("queue_timeout_s", "total_timeout_s", "evaluation_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name):g}")

    @property
    def most_samples(self) -> int:
        """The most samples of one request: largest_request, but no more than could ever be admitted."""
        return min(self.largest_request, self.max_trajectories + self.max_queued)
