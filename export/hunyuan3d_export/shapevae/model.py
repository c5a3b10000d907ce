"""ShapeVAEDecoder: latents -> keys and values -> a signed field. Attribute names are upstream's, because checkpoint keys are made
of them.

Axes: B batch, L latent tokens, P query points, C latent channels, D width, W the geometry decoder's width, H its heads,
h the blocks' heads, d head size, F frequencies. A comment at the right margin gives the shape of the line's result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import attention, resolve_backend
from .config import ShapeVAEConfig

NORM_EPS = 1e-6
POST_NORM_EPS = 1e-5  # upstream leaves this one norm at torch's default


def fourier_frequencies(count: int, *, include_pi: bool) -> Tensor:
    """1, 2, 4, ... 2^(count - 1), times pi with include_pi, [F]: float32, computed on the CPU.

    Half-precision and float64 models use these same float32 numbers, because weights are trained with them.
    """
    frequencies = 2.0 ** torch.arange(count, dtype=torch.float32, device="cpu")  #                [F]
    return frequencies * math.pi if include_pi else frequencies


def fourier_features(points: Tensor, frequencies: Tensor) -> Tensor:
    """points [B, P, 3] -> the coordinates, then all sines, then all cosines, each coordinate by coordinate, [B, P, 3*(2*F+1)].

    The result is at least float32: half precision would move a point by up to 6 % of a cell of the finest usual grid, and the
    highest frequency multiplies that error by 128.
    """
    points = at_least_float32(points)  #                                                          [B, P, 3]
    angles = (points[..., None] * frequencies.to(points.dtype)).flatten(-2)  #                    [B, P, 3*F]
    return torch.cat([points, torch.sin(angles), torch.cos(angles)], dim=-1)  #                   [B, P, 3*(2*F+1)]


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def precise(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in the dtype of x, also where the layer's weights are of half precision."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, also where its weights are of half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class QKNorm(nn.Module):
    """LayerNorm of the queries and of the keys within each head, or nothing."""

    def __init__(self, head_dim: int, *, enabled: bool) -> None:
        super().__init__()
        self.q_norm = LayerNorm(head_dim, eps=NORM_EPS) if enabled else nn.Identity()
        self.k_norm = LayerNorm(head_dim, eps=NORM_EPS) if enabled else nn.Identity()


class SelfAttention(nn.Module):
    def __init__(self, config: ShapeVAEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.width, config.width)
        self.attention = QKNorm(config.head_dim, enabled=config.qk_norm)

    def forward(self, x: Tensor, backend: str) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        # Head-major: a head's query, key and value stand side by side, unlike the denoiser's.
        qkv = self.c_qkv(x.to(self.c_qkv.weight.dtype))  #                                        [B, L, 3*D]
        q, k, v = rearrange(qkv, "B L (h K d) -> K B h L d", K=3, h=self.heads)  #                [B, h, L, d] each
        q, k = self.attention.q_norm(q), self.attention.k_norm(k)  #                              [B, h, L, d] each
        return self.c_proj(attention(q, k, v, backend=backend))  #                                [B, L, D]


class CrossAttention(nn.Module):
    def __init__(self, config: ShapeVAEConfig) -> None:
        super().__init__()
        width = config.geo_width
        self.heads = config.geo_heads
        self.c_q = nn.Linear(width, width, bias=config.qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = QKNorm(width // self.heads, enabled=config.geo_qk_norm)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, W] -> k, v, each [B, H, L, d]."""
        kv = self.c_kv(x.to(self.c_kv.weight.dtype))  #                                           [B, L, 2*W]
        k, v = rearrange(kv, "B L (H K d) -> K B H L d", K=2, H=self.heads)  #                    [B, H, L, d] each
        return self.attention.k_norm(k), v  #                                                     [B, H, L, d] each

    def forward(self, x: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """x [B, P, W], k and v [B, H, L, d] -> [B, P, W]."""
        q = self.c_q(x.to(self.c_q.weight.dtype))  #                                              [B, P, W]
        q = rearrange(q, "B P (H d) -> B H P d", H=self.heads)  #                                 [B, H, P, d]
        q = self.attention.q_norm(q)  #                                                           [B, H, P, d]
        return self.c_proj(attention(q, k, v, backend=backend))  #                                [B, P, W]


class MLP(nn.Module):
    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, ratio * width)
        self.c_proj = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # The exact GELU, unlike the denoiser's approximation by tanh.
        hidden = F.gelu(self.c_fc(x.to(self.c_fc.weight.dtype)))  #                               [B, L, ratio*D]
        return self.c_proj(hidden)  #                                                             [B, L, D]


class SelfAttentionBlock(nn.Module):
    def __init__(self, config: ShapeVAEConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, 4)
        self.ln_2 = LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor, backend: str) -> Tensor:
        x = x + self.attn(self.ln_1(x), backend)  #                                               [B, L, D]
        return x + self.mlp(self.ln_2(x))  #                                                      [B, L, D]


class Transformer(nn.Module):
    def __init__(self, config: ShapeVAEConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(SelfAttentionBlock(config) for _ in range(config.num_decoder_layers))

    def forward(self, x: Tensor, backend: str) -> Tensor:
        for block in self.resblocks:
            x = block(x, backend)  #                                                              [B, L, D]
        return x


class CrossAttentionBlock(nn.Module):
    def __init__(self, config: ShapeVAEConfig) -> None:
        super().__init__()
        width = config.geo_width
        self.attn = CrossAttention(config)
        self.ln_1 = LayerNorm(width, eps=NORM_EPS)
        self.ln_2 = LayerNorm(width, eps=NORM_EPS)
        self.ln_3 = LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, config.geo_decoder_mlp_expand_ratio)

    def keys_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, L, W] -> k, v, each [B, H, L, d]."""
        return self.attn.keys_values(self.ln_2(features))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """x [B, P, W], k and v [B, H, L, d] -> [B, P, W]."""
        x = x + self.attn(self.ln_1(x), k, v, backend)  #                                         [B, P, W]
        return x + self.mlp(self.ln_3(x))  #                                                      [B, P, W]


class GeometryDecoder(nn.Module):
    frequencies: Tensor

    def __init__(self, config: ShapeVAEConfig, *, include_pi: bool) -> None:
        super().__init__()
        width = config.geo_width
        self.include_pi = include_pi
        self.query_proj = nn.Linear(config.query_features, width)
        self.latents_proj = nn.Linear(config.width, width) if width != config.width else None
        self.cross_attn_decoder = CrossAttentionBlock(config)
        self.ln_post = LayerNorm(width, eps=POST_NORM_EPS) if config.geo_decoder_ln_post else nn.Identity()
        self.output_proj = nn.Linear(width, 1)
        # Not persistent, because upstream's files have no such key.
        frequencies = fourier_frequencies(config.num_freqs, include_pi=include_pi)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GeometryDecoder:
        """What .to(), .half() and their like do to weights and buffers, except that the frequencies are never rounded."""
        super()._apply(fn, recurse)
        exact = fourier_frequencies(len(self.frequencies), include_pi=self.include_pi)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def keys_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, L, D] -> k, v, each [B, H, L, d]."""
        if self.latents_proj is not None:
            features = self.latents_proj(features.to(self.latents_proj.weight.dtype))  #          [B, L, W]
        return self.cross_attn_decoder.keys_values(features)  #                                   [B, H, L, d] each

    def forward(self, queries: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """queries [B, P, 3], k and v [B, H, L, d] -> [B, P], at least float32."""
        # load_state_dict(assign=True) may bring weights of another device; it does not move the buffer.
        features = fourier_features(queries, self.frequencies.to(queries.device))  #              [B, P, 3*(2*F+1)]
        x = precise(self.query_proj, features)  #                                                 [B, P, W]
        x = self.cross_attn_decoder(x, k, v, backend)  #                                          [B, P, W]
        return precise(self.output_proj, self.ln_post(x)).squeeze(-1)  #                          [B, P]


class ShapeVAEDecoder(nn.Module):
    """The decoder of Hunyuan3D-2's ShapeVAE.

    State-dict keys are upstream's. Large matrix products and attention run in the dtype of the weights. In a half-precision model
    the sums between blocks, the norms of these sums, the queries' Fourier features and the first and last layer of the geometry
    decoder are float32: they cost little, and they halve the field's error.
    """

    def __init__(self, config: ShapeVAEConfig, *, include_pi: bool = False, attention_backend: str | None = None) -> None:
        """include_pi: see ShapeVAEPreset. attention_backend None: `sage` where USE_SAGEATTN=1, else `sdpa`.

        Raises ValueError for an unknown backend and ImportError for `sage` without its package.
        """
        super().__init__()
        self.config = config
        self.attention_backend = resolve_backend(attention_backend)
        self.post_kl = nn.Linear(config.embed_dim, config.width)
        self.transformer = Transformer(config)
        self.geo_decoder = GeometryDecoder(config, include_pi=include_pi)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_kl.weight.dtype

    def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the decoder that one shape needs once.

        latents [B, L, C], already divided by the scale factor -> k, v, each [B, H, L, d] in the dtype of the weights.
        """
        x = at_least_float32(self.post_kl(latents.to(self.dtype)))  #                             [B, L, D]
        x = self.transformer(x, self.attention_backend)  #                                        [B, L, D]
        return self.geo_decoder.keys_values(x)  #                                                 [B, H, L, d] each

    def field(self, queries: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The field at points: positive inside the shape, about +1 or -1 away from its surface.

        queries [B, P, 3] in about [-1.01, 1.01], k and v [B, H, L, d] -> [B, P] in the dtype of queries.
        """
        k, v = k.to(self.dtype), v.to(self.dtype)  #                                              [B, H, L, d] each
        return self.geo_decoder(queries, k, v, self.attention_backend).to(queries.dtype)  #       [B, P]
