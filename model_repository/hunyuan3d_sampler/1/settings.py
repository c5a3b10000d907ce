"""The sampler's parameters in config.pbtxt: every one read, every one known, every value parsed by its type."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """steps, guidance_scale, schedule: defaults of a request. guidance_embed: the weights are guidance-distilled.
    max_batch: rows of one denoiser call. max_trajectories: samples in progress, beyond which requests are refused."""

    steps: int
    guidance_scale: float
    schedule: str
    guidance_embed: bool
    max_batch: int
    max_trajectories: int

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Settings:
        """Raises ValueError for a missing or unknown parameter and for a value that is not of its type."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(parameters) != set(fields):
            raise ValueError(f"parameters must be {', '.join(fields)}, got {', '.join(sorted(parameters))}")
        settings = cls(**{name: _PARSERS[str(kind)](name, parameters[name]) for name, kind in fields.items()})
        schedules.sigmas(settings.schedule, settings.steps)
        if not math.isfinite(settings.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {settings.guidance_scale}")
        for name in ("max_batch", "max_trajectories"):
            if getattr(settings, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
        return settings


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{name} must be an integer, got {text!r}") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r}") from error


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {text!r}")
    return text == "true"


def _text(_name: str, text: str) -> str:
    return text


_PARSERS = {"int": _integer, "float": _number, "bool": _boolean, "str": _text}
