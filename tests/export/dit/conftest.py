"""Networks and inputs that the tests of the model share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.dit import PRESETS, DiTConfig

Inputs = tuple[Tensor, Tensor, Tensor]  # latents, t, context


@pytest.fixture(scope="session")
def narrow() -> DiTConfig:
    """Every width unusual and different from every other, so that no two axes can be confused."""
    return DiTConfig(
        in_channels=6,
        context_in_dim=20,
        hidden_size=40,
        mlp_ratio=3.0,
        num_heads=5,
        depth=2,
        depth_single_blocks=3,
        guidance_embed=False,
    )


@pytest.fixture(scope="session")
def tiny() -> DiTConfig:
    return PRESETS["tiny"].config


@pytest.fixture(scope="session")
def distilled(narrow: DiTConfig) -> DiTConfig:
    return dataclasses.replace(narrow, guidance_embed=True)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Inputs]:
    """draw(config, B, L, T, dtype): latents, t and context from a fixed seed, equal in every dtype up to rounding."""

    def inputs(config: DiTConfig, batch: int, latents: int, tokens: int, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(1000 * batch + latents + tokens)
        x = torch.randn(batch, latents, config.in_channels, generator=generator)
        t = torch.rand(batch, generator=generator)
        context = torch.randn(batch, tokens, config.context_in_dim, generator=generator)
        return x.to(dtype), t.to(dtype), context.to(dtype)

    return inputs


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """The relative L2 distance of the first from the second."""

    def error(found: Tensor, expected: Tensor) -> float:
        expected = expected.double()
        return float((found.double() - expected).norm() / expected.norm())

    return error
