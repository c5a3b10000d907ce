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


def counted(model: Hunyuan3DDiT, latent_tokens: int, context_tokens: int, *, guided: bool) -> int:
    """FLOP of the matrix products that torch runs for one sample."""
    config = model.config
    inputs = (
        torch.zeros(1, latent_tokens, config.in_channels),
        torch.zeros(1),
        torch.zeros(1, context_tokens, config.context_in_dim),
    )
    scale = (torch.ones(1),) if guided or config.guidance_embed else ()
    with FlopCounterMode(display=False) as counter:
        (model.guided if guided else model)(*inputs, *scale)
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("guidance_embed", [False, True])
def test_plain_is_what_torch_counts(sizes: tuple[int, int], guidance_embed: bool) -> None:
    config = dataclasses.replace(CONFIG, guidance_embed=guidance_embed)
    found = compute.plain(config, latent_tokens=sizes[0], context_tokens=sizes[1])
    # `standard` computes attention by matrix products, which torch counts. It does not count a CPU's fused kernel.
    assert found.total == counted(random_model(config, attention_backend="standard"), *sizes, guided=False)
    assert found.attention == 2 * 2 * sum(sizes) ** 2 * config.hidden_size * 5


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "null_tokens"), [(torch.float32, 1), (torch.float16, 2), (torch.bfloat16, 3)])
def test_guided_is_what_torch_counts(sizes: tuple[int, int], dtype: torch.dtype, null_tokens: int) -> None:
    found = compute.guided(CONFIG, latent_tokens=sizes[0], context_tokens=sizes[1], null_tokens=null_tokens)
    model = random_model(CONFIG, dtype=dtype, attention_backend="standard")
    assert found.total == counted(model, *sizes, guided=True)


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


@pytest.mark.parametrize(("preset", "ratio", "tflop"), [("v2-0", 0.80, 9.25), ("v2-mini", 0.61, 1.49), ("v2-mv", 0.61, 24.7)])
def test_guidance_costs_a_part_of_two_batches(preset: str, ratio: float, tflop: float) -> None:
    chosen = PRESETS[preset]
    sizes = {"latent_tokens": chosen.num_latents, "context_tokens": chosen.context_tokens}
    plain, guided = compute.plain(chosen.config, **sizes), compute.guided(chosen.config, **sizes)
    assert guided.total / (2 * plain.total) == pytest.approx(ratio, abs=0.005)
    assert plain.total / 1e12 == pytest.approx(tflop, rel=0.01)


def test_attention_share() -> None:
    found = compute.plain(PRESETS["v2-0"].config, latent_tokens=3072, context_tokens=1370)
    assert found.attention_share == pytest.approx(0.42, abs=0.01)
    assert found.linear + found.attention == found.total
