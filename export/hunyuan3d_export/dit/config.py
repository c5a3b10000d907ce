"""The network's shape (DiTConfig) and the published variants with their sampling defaults (PRESETS)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hunyuan3d_client import contract
from hunyuan3d_client.shapes.codec import POINT_SCALE

SCHEDULES = ("flow_match", "consistency")

# Upstream's code passes its time factor where max_period belongs. The weights are trained that way, so both numbers are 1000:
# the factor that multiplies t, and the longest period of the sinusoids.
TIME_FACTOR = 1000.0
MAX_PERIOD = 1000.0

GUIDED_FORMS = ("bias", "repeat")
# The arithmetic of a part of the network: that of the weights' dtype, or float32 in a half-precision network.
PART_PRECISIONS = ("native", "fp32")

_KINDS: Mapping[str, Any] = {"int": int, "float": (int, float), "bool": bool}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Widths and depths of one Hunyuan3DDiT. The names of the fields are those of upstream's config.yaml.

    Every field is given by its name, and none has a default:

    >>> config = DiTConfig(
    ...     in_channels=64,
    ...     context_in_dim=1536,
    ...     hidden_size=1024,
    ...     mlp_ratio=4.0,
    ...     num_heads=16,
    ...     depth=16,
    ...     depth_single_blocks=32,
    ...     guidance_embed=False,
    ... )
    >>> config == PRESETS["v2-0"].config
    True

    Raises ValueError when a field is of the wrong type or not positive, or when hidden_size is not a multiple of num_heads.
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
            # The string "false" from a YAML file is true in Python, and a bool is an int there: check types exactly.
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

        Four keys are checked and then dropped: axes_dim and theta, because the network has no positional encoding;
        qkv_bias, which is always true; and time_factor, which is always 1000.

        Raises ValueError for a missing or unknown key, and for a value that no published variant was trained with.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(params) - fields - {"axes_dim", "theta", "qkv_bias", "time_factor"})
        if unknown:
            raise ValueError(
                f"params must be those of a Hunyuan3DDiT, got unknown keys {', '.join(unknown)}\n"
                "hint: pass model.params of config.yaml, not the whole file"
            )
        # Upstream takes a missing guidance_embed for False; the official files write out every other field.
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
class Arithmetic:
    """How a network computes the same velocity. Raises ValueError for an unknown value.

    guided_form: what replaces the zero context of a guided evaluation in attention: `bias` adds ln(T) to the score of one key,
    `repeat` repeats one key T times, which needs no mask.
    attention_accumulation: native, or fp32, which casts queries, keys and values to float32 around attention.
    residual: native, or fp32, which keeps the streams of tokens between the blocks' layers in float32.
    """

    guided_form: str = "bias"
    attention_accumulation: str = "native"
    residual: str = "native"

    def __post_init__(self) -> None:
        check_form(self.guided_form)
        for name in ("attention_accumulation", "residual"):
            if getattr(self, name) not in PART_PRECISIONS:
                raise ValueError(f"{name} must be one of {', '.join(PART_PRECISIONS)}, got {getattr(self, name)!r}")


def check_form(form: str) -> str:
    """Returns the form of the guided evaluation. Raises ValueError when no such form exists."""
    if form not in GUIDED_FORMS:
        raise ValueError(f"guided form must be one of {', '.join(GUIDED_FORMS)}, got {form!r}")
    return form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One variant: its network, and the settings it is sampled with by default.

    num_latents (L) and context_tokens (T) are those of upstream's pipeline for the variant; both may differ in any request.
    The VAE expects latents / scale_factor.
    """

    name: str
    config: DiTConfig
    num_latents: int
    context_tokens: int
    schedule: str
    steps: int
    guidance_scale: float
    scale_factor: float

    @property
    def specs(self) -> dict[str, contract.ModelSpec]:
        """The tensors of each graph: plain, and guided for a base model, because distilled weights have no guided graph."""
        plain = contract.denoiser(guidance_embed=self.config.guidance_embed)
        guided = {} if self.config.guidance_embed else {"guided": contract.denoiser(guided=True)}
        return {"plain": plain, **guided}


# For tests and demonstrations: `tiny` has the channel counts and the head size of the published variants, so the same
# config.pbtxt files serve it, and a CPU evaluates it in milliseconds.
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
# Trained by this project on point clouds that a few words name, small enough for a CPU to train and for the package to ship:
# see hunyuan3d_export.shapes.
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
_FULL = DiTConfig(
    in_channels=64,
    context_in_dim=1536,
    hidden_size=1024,
    mlp_ratio=4.0,
    num_heads=16,
    depth=16,
    depth_single_blocks=32,
    guidance_embed=False,
)
_MINI = DiTConfig(
    in_channels=64,
    context_in_dim=1536,
    hidden_size=1024,
    mlp_ratio=4.0,
    num_heads=16,
    depth=8,
    depth_single_blocks=16,
    guidance_embed=False,
)
# Guidance-distilled weights take the guidance scale as an input of the network.
_FULL_DISTILLED = dataclasses.replace(_FULL, guidance_embed=True)
_MINI_DISTILLED = dataclasses.replace(_MINI, guidance_embed=True)

_FULL_SCALE = 0.9990943042622529
_MINI_SCALE = 1.0188137142395404

_VARIANTS = (
    Preset(
        name="tiny",
        config=_TINY,
        num_latents=128,
        context_tokens=1370,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=1.0,
    ),
    Preset(
        name="shapes",
        config=_SHAPES,
        num_latents=256,
        context_tokens=3,
        schedule="flow_match",
        steps=50,
        guidance_scale=1.3,
        scale_factor=POINT_SCALE,
    ),
    Preset(
        name="v2-0",
        config=_FULL,
        num_latents=3072,
        context_tokens=1370,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=_FULL_SCALE,
    ),
    Preset(
        name="v2-0-fast",
        config=_FULL_DISTILLED,
        num_latents=3072,
        context_tokens=1370,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=_FULL_SCALE,
    ),
    Preset(
        name="v2-0-turbo",
        config=_FULL_DISTILLED,
        num_latents=3072,
        context_tokens=1370,
        schedule="consistency",
        steps=5,
        guidance_scale=5.0,
        scale_factor=_FULL_SCALE,
    ),
    Preset(
        name="v2-mini",
        config=_MINI,
        num_latents=512,
        context_tokens=1370,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=_MINI_SCALE,
    ),
    Preset(
        name="v2-mini-fast",
        config=_MINI_DISTILLED,
        num_latents=512,
        context_tokens=1370,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=_MINI_SCALE,
    ),
    Preset(
        name="v2-mini-turbo",
        config=_MINI_DISTILLED,
        num_latents=3072,
        context_tokens=5330,
        schedule="consistency",
        steps=5,
        guidance_scale=5.0,
        scale_factor=_MINI_SCALE,
    ),
    Preset(
        name="v2-mv",
        config=_FULL,
        num_latents=3072,
        context_tokens=5480,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=_FULL_SCALE,
    ),
    Preset(
        name="v2-mv-fast",
        config=_FULL_DISTILLED,
        num_latents=3072,
        context_tokens=5480,
        schedule="flow_match",
        steps=50,
        guidance_scale=5.0,
        scale_factor=_FULL_SCALE,
    ),
    Preset(
        name="v2-mv-turbo",
        config=_FULL_DISTILLED,
        num_latents=3072,
        context_tokens=5480,
        schedule="consistency",
        steps=5,
        guidance_scale=5.0,
        scale_factor=_FULL_SCALE,
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _VARIANTS}
