"""The same weights in the official code and in ours give the same field, and each known trap would be noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.shapevae import ShapeVAEConfig, ShapeVAEDecoder, random_model

Build = Callable[..., Any]
Draw = Callable[..., tuple[Tensor, Tensor]]
Fields = tuple[Tensor, Tensor]  # ours, upstream's
# (B, L, P): the sizes within a shape differ, and each size is 1 once.
SHAPES = [(1, 5, 9), (2, 33, 17), (3, 8, 70), (4, 1, 2), (2, 19, 1)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6}


def ours_of(decoder: ShapeVAEDecoder, latents: Tensor, queries: Tensor) -> Tensor:
    return decoder.field(queries, *decoder.keys_values(latents))


def theirs_of(official: Any, latents: Tensor, queries: Tensor) -> Tensor:
    values: Tensor = official.geo_decoder(queries, latents=official(latents)).squeeze(-1)
    return values


@pytest.fixture
def fields(build: Build, draw: Draw, config: ShapeVAEConfig) -> Callable[..., Fields]:
    """fields(dtype, change=None): the field by our code, whose decoder `change` may alter, and by upstream's."""

    def both(dtype: torch.dtype, change: Callable[[ShapeVAEDecoder], None] | None = None) -> Fields:
        ours = random_model(config, seed=3, dtype=dtype)
        theirs = build(config, ours.state_dict(), dtype)
        ours = ShapeVAEDecoder(config).to(dtype)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        if change:
            with torch.no_grad():
                change(ours)
        inputs = draw(config.embed_dim, 2, 33, 65, dtype)
        return ours_of(ours, *inputs).detach(), theirs_of(theirs, *inputs)

    return both


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_field_is_the_official_one(build: Build, draw: Draw, config: ShapeVAEConfig, dtype: torch.dtype) -> None:
    ours = random_model(config, seed=3, dtype=dtype)
    theirs = build(config, ours.state_dict(), dtype)
    for shape in SHAPES:
        latents, queries = draw(config.embed_dim, *shape, dtype)
        found = ours_of(ours, latents, queries)
        assert found.dtype == dtype and found.shape == queries.shape[:2]
        assert relative_l2(found, theirs_of(theirs, latents, queries)) <= TOLERANCES[dtype], shape


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_frequencies_with_pi(build: Build, draw: Draw, config: ShapeVAEConfig, dtype: torch.dtype) -> None:
    ours = random_model(config, seed=3, include_pi=True, dtype=dtype)
    theirs = build(config, ours.state_dict(), dtype, include_pi=True)
    inputs = draw(config.embed_dim, 2, 33, 65, dtype)
    assert relative_l2(ours_of(ours, *inputs), theirs_of(theirs, *inputs)) <= TOLERANCES[dtype]


def include_pi(decoder: ShapeVAEDecoder) -> None:
    decoder.geo_decoder.frequencies *= torch.pi


def k_major_qkv(decoder: ShapeVAEDecoder) -> None:
    layer = decoder.transformer.resblocks[0].attn.c_qkv
    layer.weight.copy_(rearrange(layer.weight, "(h K d) D -> (K h d) D", K=3, h=decoder.config.heads))


def k_major_kv(decoder: ShapeVAEDecoder) -> None:
    layer = decoder.geo_decoder.cross_attn_decoder.attn.c_kv
    layer.weight.copy_(rearrange(layer.weight, "(H K d) W -> (K H d) W", K=2, H=decoder.config.geo_heads))


def no_bias_of_q_norm(decoder: ShapeVAEDecoder) -> None:
    decoder.transformer.resblocks[0].attn.attention.q_norm.bias.zero_()


def swapped_norms(decoder: ShapeVAEDecoder) -> None:
    block = decoder.geo_decoder.cross_attn_decoder
    block.ln_1, block.ln_3 = block.ln_3, block.ln_1


def eps_of_ln_post(decoder: ShapeVAEDecoder) -> None:
    decoder.geo_decoder.ln_post.eps = 1e-6


TRAPS = [include_pi, k_major_qkv, k_major_kv, no_bias_of_q_norm, swapped_norms, eps_of_ln_post]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
@pytest.mark.parametrize("config", ["base"], indirect=True)
def test_parity_would_notice(trap: Callable[..., None], dtype: torch.dtype, fields: Callable[..., Fields]) -> None:
    assert relative_l2(*fields(dtype)) <= TOLERANCES[dtype] < relative_l2(*fields(dtype, trap))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("config", ["base", "turbo"], indirect=True)
def test_parity_would_notice_another_gelu(
    dtype: torch.dtype, fields: Callable[..., Fields], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = F.gelu
    ours, theirs = fields(dtype)
    assert relative_l2(ours, theirs) <= TOLERANCES[dtype]
    monkeypatch.setattr(F, "gelu", lambda x, **_: exact(x, approximate="tanh"))
    approximate, _ = fields(dtype)
    assert relative_l2(approximate, theirs) > TOLERANCES[dtype]


def test_state_dicts_load_strictly_both_ways(build: Build, config: ShapeVAEConfig) -> None:
    ours = random_model(config)
    theirs = build(config, ours.state_dict(), torch.float32)
    ShapeVAEDecoder(config).load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("config", ["base", "turbo"], indirect=True)
def test_every_parameter_matters(draw: Draw, config: ShapeVAEConfig) -> None:
    """Parity would notice a change of any parameter but the keys' biases, which move all scores of a query equally."""
    ours = random_model(config, seed=3, dtype=torch.float64)
    inputs = draw(config.embed_dim, 2, 33, 17, torch.float64)
    expected = ours_of(ours, *inputs)
    for name, parameter in ours.named_parameters():
        if name.endswith("k_norm.bias"):
            continue
        before = parameter.clone()
        parameter.copy_(before + 0.01 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        assert relative_l2(ours_of(ours, *inputs), expected) > 1e-8, name
        parameter.copy_(before)


@pytest.mark.parametrize("config", ["base", "turbo"], indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_is_three_times_as_exact_as_the_official(
    build: Build, draw: Draw, config: ShapeVAEConfig, seed: int
) -> None:
    """The weights are float16 numbers, as in the official files. The bounds are those of the field's root mean square error."""
    config = dataclasses.replace(config, embed_dim=64, width=256, heads=4)
    half = random_model(config, seed, dtype=torch.float16)
    exact = random_model(config, seed, dtype=torch.float16).double()
    latents, queries = draw(64, 1, 80, 2000, torch.float32)
    expected = ours_of(exact, latents.double(), queries.double())
    found = ours_of(half, latents, queries)
    theirs = theirs_of(build(config, half.state_dict(), torch.float16), latents.half(), queries.half())
    ours_error, their_error = (
        float((values.double() - expected).square().mean().sqrt() / expected.std()) for values in (found, theirs)
    )
    assert 0 < ours_error <= 1e-3 and ours_error <= their_error / 3


def test_queries_and_frequencies_stay_float32_in_a_half_precision_model() -> None:
    config = ShapeVAEConfig(
        embed_dim=64, width=64, heads=1, num_decoder_layers=1, geo_decoder_downsample_ratio=1, geo_decoder_mlp_expand_ratio=1,
        geo_decoder_ln_post=True, num_freqs=8, qkv_bias=False, qk_norm=True,
    )  # fmt: skip
    half = random_model(config, dtype=torch.float16, include_pi=True)
    moved = random_model(config, include_pi=True).half().to("cpu")
    for decoder in (half, moved):
        frequencies = decoder.geo_decoder.frequencies
        assert frequencies.dtype == torch.float32 and float(frequencies[-1]) == pytest.approx(128 * torch.pi, rel=1e-7)
    k, v = half.keys_values(torch.randn(1, 5, 64))
    near = torch.tensor([[[0.7, 0.7, 0.7], [0.70005, 0.7, 0.7]]])
    values = half.field(near, k, v)
    assert near.half().unique().numel() == 1, "float16 cannot tell these points apart"
    assert values.dtype == torch.float32 and values[0, 0] != values[0, 1]
