"""The network's shape (DiTConfig) and the published variants with their sampling defaults (PRESETS)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

SCHEDULES = ("flow_match", "consistency")

# Upstream passes its time factor into the slot of max_period, and the weights are trained so:
# both the multiplier of t and the longest period of the sinusoids are 1000.
TIME_FACTOR = 1000.0
MAX_PERIOD = 1000.0

_KINDS: Mapping[str, Any] = {"int": int, "float": (int, float), "bool": bool}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Widths and depths of one Hunyuan3DDiT; field names are those of upstream's config.yaml.

    Raises ValueError when a field is of the wrong type, not positive, or hidden_size is not a multiple of num_heads.
    """

    in_channels: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    guidance_embed: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _KINDS[str(field.type)]
            # A YAML "false" is a true string and a bool is an int: neither may pass for the other.
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{field.name} must be of type {field.type}, got {value!r}")
            if kind is not bool and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads={self.num_heads}, got {self.hidden_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def from_upstream(cls, params: Mapping[str, Any]) -> DiTConfig:
        """The config from the `params` of the DiT in an official config.yaml.

        Keys the network does not depend on are checked, then dropped: axes_dim and theta (there is no positional
        encoding), qkv_bias (always true), time_factor (always 1000).

        Raises ValueError for a missing or unknown key and for a value this network was never trained with.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(params) - fields - {"axes_dim", "theta", "qkv_bias", "time_factor"})
        if unknown:
            raise ValueError(
                f"params must be those of a Hunyuan3DDiT, got unknown keys {', '.join(unknown)}\n"
                "hint: pass model.params of config.yaml, not the whole file"
            )
        # Upstream's own default; every other field is written out in the official files.
        values = {"guidance_embed": False, **{key: params[key] for key in fields if key in params}}
        missing = sorted(fields - set(values))
        if missing:
            raise ValueError(f"params must name {', '.join(sorted(fields))}, got none for {', '.join(missing)}")
        config = cls(**values)
        config._check_upstream_constants(params)
        return config

    def _check_upstream_constants(self, params: Mapping[str, Any]) -> None:
        axes_dim = params.get("axes_dim", [self.head_dim])
        if not isinstance(axes_dim, (list, tuple)) or sum(axes_dim) != self.head_dim:
            raise ValueError(f"axes_dim must be a list that sums to the head size {self.head_dim}, got {axes_dim!r}")
        theta = params.get("theta", 10_000)
        if not isinstance(theta, (int, float)) or theta <= 0:
            raise ValueError(f"theta must be a positive number, got {theta!r}")
        if params.get("qkv_bias", True) is not True:
            raise ValueError(f"qkv_bias must be true, got {params['qkv_bias']!r}")
        if params.get("time_factor", TIME_FACTOR) != TIME_FACTOR:
            raise ValueError(f"time_factor must be {TIME_FACTOR:g}, got {params['time_factor']!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One published variant: its network and what it is sampled with by default.

    num_latents is L and context_tokens is T of the variant's own pipeline (both stay free at run time);
    the VAE takes latents / scale_factor.
    """

    name: str
    config: DiTConfig
    num_latents: int
    context_tokens: int
    schedule: str
    steps: int
    guidance_scale: float
    scale_factor: float


def _dit(*, depth: int, depth_single_blocks: int, guidance_embed: bool) -> DiTConfig:
    return DiTConfig(
        in_channels=64,
        context_in_dim=1536,
        hidden_size=1024,
        mlp_ratio=4.0,
        num_heads=16,
        depth=depth,
        depth_single_blocks=depth_single_blocks,
        guidance_embed=guidance_embed,
    )


_FULL = _dit(depth=16, depth_single_blocks=32, guidance_embed=False)
_FULL_DISTILLED = _dit(depth=16, depth_single_blocks=32, guidance_embed=True)
_MINI = _dit(depth=8, depth_single_blocks=16, guidance_embed=False)
_MINI_DISTILLED = _dit(depth=8, depth_single_blocks=16, guidance_embed=True)
# `tiny` keeps the contract's channel counts and head size, so the same files serve it; a CPU evaluates it in milliseconds.
_TINY = DiTConfig(
    in_channels=64,
    context_in_dim=1536,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    guidance_embed=False,
)
# Point clouds named by a few words, small enough to train on a CPU and to ship: see hunyuan3d_export.shapes.
_SHAPES = DiTConfig(
    in_channels=64,
    context_in_dim=1536,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=5,
    guidance_embed=False,
)

_FULL_SCALE = 0.9990943042622529
_MINI_SCALE = 1.0188137142395404

# name, network, L, T, schedule, steps, guidance scale, scale factor
_TABLE: tuple[tuple[str, DiTConfig, int, int, str, int, float, float], ...] = (
    ("tiny", _TINY, 128, 1370, "flow_match", 50, 5.0, 1.0),
    ("shapes", _SHAPES, 256, 3, "flow_match", 50, 1.3, 1.0),
    ("v2-0", _FULL, 3072, 1370, "flow_match", 50, 5.0, _FULL_SCALE),
    ("v2-0-fast", _FULL_DISTILLED, 3072, 1370, "flow_match", 50, 5.0, _FULL_SCALE),
    ("v2-0-turbo", _FULL_DISTILLED, 3072, 1370, "consistency", 5, 5.0, _FULL_SCALE),
    ("v2-mini", _MINI, 512, 1370, "flow_match", 50, 5.0, _MINI_SCALE),
    ("v2-mini-fast", _MINI_DISTILLED, 512, 1370, "flow_match", 50, 5.0, _MINI_SCALE),
    ("v2-mini-turbo", _MINI_DISTILLED, 3072, 5330, "consistency", 5, 5.0, _MINI_SCALE),
    ("v2-mv", _FULL, 3072, 5480, "flow_match", 50, 5.0, _FULL_SCALE),
    ("v2-mv-fast", _FULL_DISTILLED, 3072, 5480, "flow_match", 50, 5.0, _FULL_SCALE),
    ("v2-mv-turbo", _FULL_DISTILLED, 3072, 5480, "consistency", 5, 5.0, _FULL_SCALE),
)

PRESETS: Mapping[str, Preset] = {
    row[0]: Preset(
        name=row[0],
        config=row[1],
        num_latents=row[2],
        context_tokens=row[3],
        schedule=row[4],
        steps=row[5],
        guidance_scale=row[6],
        scale_factor=row[7],
    )
    for row in _TABLE
}
