"""The cost of the decoder's two graphs, counted from shapes."""

from __future__ import annotations

from ..dit.compute import Flop
from .config import ShapeVAEConfig


def keys_values(config: ShapeVAEConfig, *, latent_tokens: int) -> Flop:
    """FLOP of the keys and values of one shape."""
    width, geo_width, layers = config.width, config.geo_width, config.num_decoder_layers
    per_token = config.embed_dim * width + layers * (4 + 2 * 4) * width * width  # qkv, projection and both MLP layers
    per_token += (width * geo_width if geo_width != width else 0) + 2 * geo_width * geo_width
    return Flop(2 * per_token * latent_tokens, 2 * 2 * latent_tokens**2 * width * layers)


def field(config: ShapeVAEConfig, *, latent_tokens: int, points: int) -> Flop:
    """FLOP of the field at the points of one shape, given its keys and values."""
    width = config.geo_width
    per_point = config.query_features * width + (2 + 2 * config.geo_decoder_mlp_expand_ratio) * width * width + width
    return Flop(2 * per_point * points, 2 * 2 * points * latent_tokens * width)
