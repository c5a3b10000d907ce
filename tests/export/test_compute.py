"""FLOP and parameters computed from shapes, against the numbers that torch counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hunyuan3d_export.dit import PRESETS, DiTConfig, Hunyuan3DDiT, compute, random_model

CONFIG = DiTConfig(
    in_channels=6,
    context_in_dim=20,
    hidden_size=40,
    mlp_ratio=3.0,
    num_heads=5,
    depth=2,
    depth_single_blocks=3,
    guidance_embed=False,
)
SIZES = [(7, 5), (11, 1), (1, 13)]


def counted(model: Hunyuan3DDiT, latent_tokens: int, context_tokens: int, *, form: str | None = None) -> int:
    """FLOP of the matrix products that torch runs for one sample. form: of a guided evaluation; None is a plain one."""
    config = model.config
    inputs = (
        torch.zeros(1, latent_tokens, config.in_channels),
        torch.zeros(1),
        torch.zeros(1, context_tokens, config.context_in_dim),
    )
    guidance = torch.ones(1)
    with FlopCounterMode(display=False) as counter:
        if form is not None:
            model.guided(*inputs, guidance, form=form)
        else:
            model(*inputs, guidance if config.guidance_embed else None)
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("guidance_embed", [False, True])
def test_plain_is_what_torch_counts(sizes: tuple[int, int], guidance_embed: bool) -> None:
    config = dataclasses.replace(CONFIG, guidance_embed=guidance_embed)
    found = compute.plain(config, latent_tokens=sizes[0], context_tokens=sizes[1])
    # `standard` computes attention by matrix products, which torch counts. It does not count a CPU's fused kernel.
    assert found.total == counted(random_model(config, attention_backend="standard"), *sizes)
    assert found.attention == 2 * 2 * sum(sizes) ** 2 * config.hidden_size * 5


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("form", "dtype", "null_tokens"),
    [
        ("bias", torch.float32, 1),
        ("bias", torch.float16, 2),
        ("bias", torch.bfloat16, 3),
        ("repeat", torch.float32, 1),
        ("repeat", torch.bfloat16, 1),
    ],
)
def test_guided_is_what_torch_counts(sizes: tuple[int, int], form: str, dtype: torch.dtype, null_tokens: int) -> None:
    assert compute.null_tokens(form, dtype) == null_tokens
    found = compute.guided(CONFIG, latent_tokens=sizes[0], context_tokens=sizes[1], form=form, null_tokens=null_tokens)
    model = random_model(CONFIG, dtype=dtype, attention_backend="standard")
    assert found.total == counted(model, *sizes, form=form)


def test_joined_weights_change_no_count() -> None:
    model = random_model(CONFIG, attention_backend="standard")
    before = counted(model, 7, 5), counted(model, 7, 5, form="repeat")
    model.prepare_for_graph()
    assert (counted(model, 7, 5), counted(model, 7, 5, form="repeat")) == before


@pytest.mark.parametrize("guidance_embed", [False, True])
def test_parameters(guidance_embed: bool) -> None:
    config = dataclasses.replace(CONFIG, guidance_embed=guidance_embed)
    assert compute.parameters(config) == sum(value.numel() for value in random_model(config).state_dict().values())


@pytest.mark.parametrize(
    ("preset", "count"),
    [("v2-0", 1_113_274_432), ("v2-0-turbo", 1_114_587_200), ("v2-mini", 559_196_224), ("v2-mini-fast", 560_508_992)],
)
def test_parameters_of_the_published_variants(preset: str, count: int) -> None:
    assert compute.parameters(PRESETS[preset].config) == count


@pytest.mark.parametrize(
    ("preset", "bias", "repeat", "tflop"),
    [("v2-0", 0.801, 0.846, 9.25), ("v2-mini", 0.613, 0.636, 1.49), ("v2-mv", 0.613, 0.680, 24.7)],
)
def test_guidance_costs_a_part_of_two_batches(preset: str, bias: float, repeat: float, tflop: float) -> None:
    chosen = PRESETS[preset]
    sizes = {"latent_tokens": chosen.num_latents, "context_tokens": chosen.context_tokens}
    plain = compute.plain(chosen.config, **sizes)
    for form, ratio in {"bias": bias, "repeat": repeat}.items():
        guided = compute.guided(chosen.config, **sizes, form=form)
        assert guided.total / (2 * plain.total) == pytest.approx(ratio, abs=0.0006), form
    assert plain.total / 1e12 == pytest.approx(tflop, rel=0.01)


def test_attention_share() -> None:
    found = compute.plain(PRESETS["v2-0"].config, latent_tokens=3072, context_tokens=1370)
    assert found.attention_share == pytest.approx(0.42, abs=0.01)
    assert found.linear + found.attention == found.total
