"""The decoder's shape (ShapeVAEConfig), and the decoders that belong to the published variants (PRESETS)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hunyuan3d_client import contract

from ..dit.config import PRESETS as DIT_PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeVAEConfig:
    """Widths and depths of one ShapeVAE's decoder. The names of the fields are those of upstream's config.yaml.

    qk_norm: blocks normalise queries and keys; the geometry decoder does so only if it has ln_post too.

    Raises ValueError when a size is not a positive integer, or when a size is not a multiple of another as it must be.
    """

    embed_dim: int
    width: int
    heads: int
    num_decoder_layers: int
    geo_decoder_downsample_ratio: int
    geo_decoder_mlp_expand_ratio: int
    geo_decoder_ln_post: bool
    num_freqs: int
    qkv_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:  # a bool is an int in Python, so compare types exactly
                raise ValueError(f"{field.name} must be of type {field.type}, got {value!r}")
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} must be positive, got {value}")
        ratio = self.geo_decoder_downsample_ratio
        for name, divisor in (("width", self.heads), ("width", ratio), ("heads", ratio)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def geo_width(self) -> int:
        """The geometry decoder's width."""
        return self.width // self.geo_decoder_downsample_ratio

    @property
    def geo_heads(self) -> int:
        """The geometry decoder's number of heads: H of the keys and values."""
        return self.heads // self.geo_decoder_downsample_ratio

    @property
    def geo_qk_norm(self) -> bool:
        """Whether the geometry decoder normalises queries and keys."""
        return self.qk_norm and self.geo_decoder_ln_post

    @property
    def query_features(self) -> int:
        """The number of Fourier features of a point: its coordinates, their sines and their cosines."""
        return 3 * (2 * self.num_freqs + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeVAEPreset:
    """One variant: its decoder, and the facts about it that its weights do not show.

    num_latents: the usual L. scale_factor: the decoder takes the sampler's latents divided by this number. include_pi: whether
    the frequencies of the Fourier features are multiples of pi. keys_values: the wire's dtype of k and v, FP16 or FP32.

    Raises ValueError when the contract has no such keys and values, or when the scale factor is not positive.
    """

    name: str
    config: ShapeVAEConfig
    num_latents: int
    scale_factor: float
    include_pi: bool = False
    keys_values: str = "FP16"

    def __post_init__(self) -> None:
        if self.keys_values not in contract.KEYS_VALUES_DTYPES:
            raise ValueError(f"keys_values must be {' or '.join(contract.KEYS_VALUES_DTYPES)}, got {self.keys_values!r}")
        if not 0 < self.scale_factor < float("inf"):
            raise ValueError(f"scale_factor must be positive, got {self.scale_factor}")
        found = self.config.embed_dim, self.config.head_dim
        if found != (contract.LATENT_CHANNELS, contract.HEAD_SIZE):
            raise ValueError(
                f"weights must have {contract.LATENT_CHANNELS} latent channels and head size {contract.HEAD_SIZE}, got {found[0]} and {found[1]}"
            )

    @property
    def specs(self) -> dict[str, contract.ModelSpec]:
        """The tensors of the two graphs, with the number of heads fixed: `vae` and `field`."""
        fixed = {"H": self.config.geo_heads}
        return {
            "vae": contract.vae(self.keys_values).sized(fixed),
            "field": contract.field(self.keys_values).sized(fixed),
        }


_TINY = ShapeVAEConfig(
    embed_dim=64,
    width=128,
    heads=2,
    num_decoder_layers=2,
    geo_decoder_downsample_ratio=1,
    geo_decoder_mlp_expand_ratio=4,
    geo_decoder_ln_post=True,
    num_freqs=8,
    qkv_bias=False,
    qk_norm=True,
)
_BASE = ShapeVAEConfig(
    embed_dim=64,
    width=1024,
    heads=16,
    num_decoder_layers=16,
    geo_decoder_downsample_ratio=1,
    geo_decoder_mlp_expand_ratio=4,
    geo_decoder_ln_post=True,
    num_freqs=8,
    qkv_bias=False,
    qk_norm=True,
)
# A smaller geometry decoder, which is published as a file of its own: hunyuan3d-vae-v2-0-turbo.
_TURBO = dataclasses.replace(_BASE, geo_decoder_downsample_ratio=2, geo_decoder_mlp_expand_ratio=1, geo_decoder_ln_post=False)
_CONFIGS: Mapping[str, ShapeVAEConfig] = {
    "tiny": _TINY,
    "shapes": _TINY,
    "v2-0": _BASE,
    "v2-0-fast": _BASE,
    "v2-0-turbo": _TURBO,
    "v2-mini": _BASE,
    "v2-mini-fast": _BASE,
    "v2-mini-turbo": _TURBO,
    "v2-mv": _BASE,
    "v2-mv-fast": _BASE,
    "v2-mv-turbo": _TURBO,
}

PRESETS: Mapping[str, ShapeVAEPreset] = {
    name: ShapeVAEPreset(name=name, config=_CONFIGS[name], num_latents=dit.num_latents, scale_factor=dit.scale_factor)
    for name, dit in DIT_PRESETS.items()
}
