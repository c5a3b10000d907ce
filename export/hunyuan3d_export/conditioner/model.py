"""DINOv2 as transformers implements it, from normalised pixels to condition tokens.

Axes: B batch, V views, P side of the picture in pixels, N tokens of one view, T = V N, D width, C context width, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from hunyuan3d_client import contract

from .config import HEAD_DIM, PATCH, ConditionerConfig, Words

_LONGEST_PERIOD = 10_000.0


class WordHead(nn.Module):
    """Reads a few words from a picture's CLS token; each word stands for a vector of the context's width.

    A word is chosen by a softmax over scores so far apart that its result is one word's vector. A linear layer instead would give
    mixtures of the vectors, and a denoiser that was trained on words has never seen a mixture.
    """

    def __init__(self, width: int, words: Words) -> None:
        super().__init__()
        self.words = words
        self.choice = nn.Linear(width, words.tokens * words.vocabulary)
        self.vectors = nn.Parameter(torch.empty(words.vocabulary, contract.CONTEXT_WIDTH), requires_grad=False)

    def scores(self, cls: Tensor) -> Tensor:
        """cls [..., D] -> the score of each word, [..., N, W]."""
        return self.choice(cls).unflatten(-1, (self.words.tokens, self.words.vocabulary))

    def forward(self, cls: Tensor) -> Tensor:
        """cls [..., D] -> the words' vectors, [..., N, C]."""
        return self.scores(cls).softmax(-1) @ self.vectors


class Conditioner(nn.Module):
    """pixels [B, V, 3, P, P] -> context [B, T, D]; attention is transformers' `sdpa` or `eager`."""

    view_vectors: Tensor

    def __init__(self, config: ConditionerConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.dinov2 = Dinov2Model(_transformers_config(config, attention))
        self.head = WordHead(config.hidden_size, config.words) if config.words else None
        self.register_buffer("view_vectors", view_vectors(config.views, config.hidden_size), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [B, V, 3, P, P] -> float16 [B, T, D], the views in the order front, left, back, right."""
        hidden = self.hidden(pixels)  # B, V, N, D
        if self.head is not None:
            hidden = self.head(hidden[:, :, 0])  # B, V, N, C
        return hidden.flatten(1, 2).half()  # B, T, D

    def hidden(self, pixels: Tensor) -> Tensor:
        """float32 [B, V, 3, P, P] -> all tokens of the last layer [B, V, N, D], in the dtype of the weights."""
        batch, views = pixels.shape[:2]
        # Dinov2Model.forward is not called, because an exported graph needs neither its mask nor its record of hidden states.
        hidden = self.dinov2.embeddings(pixels.flatten(0, 1))  # B V, N, D
        for layer in self.dinov2.encoder.layer:
            hidden = layer(hidden)
        hidden = self.dinov2.layernorm(hidden).unflatten(0, (batch, views))  # B, V, N, D
        if self.config.views > 1:
            hidden = hidden + self.view_vectors[:views, None].to(hidden.dtype)
        return hidden


def view_vectors(views: int, width: int) -> Tensor:
    """[V, D] float32: sin then cos of the view's number times D / 2 frequencies, from 1 down to nearly 1 / 10000."""
    half = width // 2
    frequencies = _LONGEST_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(views, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def resized_positions(positions: Tensor, image_size: int) -> Tensor:
    """Position embeddings [1, 1 + G G, D] for another picture size: the grid is interpolated (bicubic), the CLS token stays."""
    found, wanted = round((positions.shape[1] - 1) ** 0.5), image_size // PATCH
    if found == wanted:
        return positions
    grid = positions[:, 1:].unflatten(1, (found, found)).permute(0, 3, 1, 2).float()
    grid = nn.functional.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).mT.to(positions.dtype)], dim=1)


def _transformers_config(config: ConditionerConfig, attention: str) -> Dinov2Config:
    found = Dinov2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.hidden_size // HEAD_DIM,
        mlp_ratio=config.mlp_ratio,
        use_swiglu_ffn=config.gated,
        image_size=config.image_size,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    found._attn_implementation = attention
    return found
