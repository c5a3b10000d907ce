"""The sampler's parameters in config.pbtxt: every one read, every one known, every value parsed by its type."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import schedules

ARRAYS = ("numpy", "auto")
_TRITONS_OWN = {"FORCE_CPU_ONLY_INPUT_TENSORS"}  # read by the Python backend itself
# Two rows: the smallest call of two-batch guidance.
_LEAST = {"max_batch": 2, "max_tokens_per_step": 1, "max_trajectories": 1, "max_queued": 0, "lanes": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Defaults of a request: steps, guidance_scale, schedule. guidance_embed: the weights are guidance-distilled.

    One denoiser call: at most max_batch rows and max_tokens_per_step tokens (rows x (L + T); one sample always passes).
    lanes: calls at the same time, for as many denoiser instances. evaluation_timeout_s: after it a call counts as failed.
    Admission: max_trajectories samples are stepped, max_queued more wait at most queue_timeout_s; total_timeout_s is the
    longest that a request may take in all. arrays: where states live, numpy or auto (CuPy where it finds a GPU).
    restart_denoiser: load a denoiser again that fails even a minimal call, as one whose process has died does.
    """

    steps: int
    guidance_scale: float
    schedule: str
    guidance_embed: bool
    max_batch: int
    max_tokens_per_step: int
    max_trajectories: int
    max_queued: int
    lanes: int
    queue_timeout_s: float
    total_timeout_s: float
    evaluation_timeout_s: float
    arrays: str
    restart_denoiser: bool

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Settings:
        """Raises ValueError for a missing or unknown parameter and for a value that is not of its type."""
        given = {name: text for name, text in parameters.items() if name not in _TRITONS_OWN}
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(given) != set(fields):
            raise ValueError(f"parameters must be {', '.join(fields)}, got {', '.join(sorted(given))}")
        settings = cls(**{name: _PARSERS[str(kind)](name, given[name]) for name, kind in fields.items()})
        schedules.sigmas(settings.schedule, settings.steps)
        if settings.arrays not in ARRAYS:
            raise ValueError(f"arrays must be {' or '.join(ARRAYS)}, got {settings.arrays!r}")
        for name, least in _LEAST.items():
            if getattr(settings, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")
        for name in ("queue_timeout_s", "total_timeout_s", "evaluation_timeout_s"):
            if getattr(settings, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(settings, name):g}")
        return settings

    @property
    def largest_request(self) -> int:
        """Samples of one request: more could never be admitted."""
        return self.max_trajectories + self.max_queued


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{name} must be an integer, got {text!r}") from error


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {text!r}")
    return text == "true"


def _text(_name: str, text: str) -> str:
    return text


_PARSERS = {"int": _integer, "float": _number, "bool": _boolean, "str": _text}
