"""Decoders of unusual sizes, inputs for them, and the tiny decoder's artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.shapevae import PRESETS, ShapeVAEConfig, random_model, save_checkpoint
from hunyuan3d_export.shapevae.weights import ShapeVAESource

# Every size is unusual and different from the others, so that no two axes can be confused.
BASE = ShapeVAEConfig(
    embed_dim=6,
    width=96,
    heads=3,
    num_decoder_layers=2,
    geo_decoder_downsample_ratio=1,
    geo_decoder_mlp_expand_ratio=3,
    geo_decoder_ln_post=True,
    num_freqs=8,
    qkv_bias=False,
    qk_norm=True,
)
CONFIGS = {
    "base": BASE,
    "turbo": dataclasses.replace(
        BASE, heads=6, geo_decoder_downsample_ratio=2, geo_decoder_mlp_expand_ratio=1, geo_decoder_ln_post=False
    ),
    "plain": dataclasses.replace(BASE, width=128, heads=2, num_decoder_layers=1, num_freqs=5, qkv_bias=True, qk_norm=False),
}


@pytest.fixture(scope="session", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ShapeVAEConfig:
    """A decoder of each layout: the base model's, turbo's, and one with biases and without norms of queries and keys."""
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def draw() -> Callable[..., tuple[Tensor, Tensor]]:
    """draw(channels, B, L, P, dtype): latents and points in the bounds of upstream's grid."""

    def inputs(channels: int, batch: int, length: int, points: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * batch + length + points)
        latents = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)
        queries = 2.02 * torch.rand(batch, points, 3, generator=generator, dtype=torch.float64) - 1.01
        return latents.to(dtype), queries.to(dtype)

    return inputs


TINY = {
    "base": PRESETS["tiny"].config,
    "turbo": dataclasses.replace(
        PRESETS["tiny"].config,
        num_decoder_layers=1,
        geo_decoder_downsample_ratio=2,
        geo_decoder_mlp_expand_ratio=1,
        geo_decoder_ln_post=False,
    ),
}


@pytest.fixture(scope="session")
def source(root: Path) -> Callable[..., ShapeVAESource]:
    """source(variant="base", scale_factor=None): a checkpoint in half precision, as the official files are."""

    def make(variant: str = "base", scale_factor: float | None = None) -> ShapeVAESource:
        path = root / "build" / "test" / f"vae-{variant}.safetensors"
        save_checkpoint(random_model(TINY[variant], seed=4), path, dtype=torch.float16)
        return ShapeVAESource(path=path, preset="v2-mini", scale_factor=scale_factor)

    return make


@pytest.fixture(scope="session")
def exported(root: Path, source: Callable[..., ShapeVAESource]) -> Callable[..., Path]:
    """exported(precision="fp32", attention="op", variant="base"): the folder that holds both artifacts."""

    def export(*, precision: str = "fp32", attention: str = "op", variant: str = "base") -> Path:
        options = OnnxOptions(precision=precision, attention=attention)
        out = root / "build" / "test" / f"vae-{variant}-{precision}-{attention}"
        return export_onnx(source(variant), out, options=options)[0].parent

    return export
