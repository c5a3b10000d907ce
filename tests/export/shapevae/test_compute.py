"""FLOP of the two graphs computed from shapes, against the numbers that torch counts and those of the published decoders."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hunyuan3d_export.shapevae import PRESETS, compute, random_model

from .conftest import CONFIGS


@pytest.mark.parametrize("sizes", [(7, 5), (1, 13)], ids=str)
@pytest.mark.parametrize("variant", CONFIGS)
def test_both_graphs_are_what_torch_counts(variant: str, sizes: tuple[int, int]) -> None:
    config, (latent_tokens, points) = CONFIGS[variant], sizes
    # `standard` computes attention by matrix products, which torch counts. It does not count a CPU's fused kernel.
    decoder = random_model(config, attention_backend="standard")
    with FlopCounterMode(display=False) as counter:
        k, v = decoder.keys_values(torch.zeros(1, latent_tokens, config.embed_dim))
    assert compute.keys_values(config, latent_tokens=latent_tokens).total == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        decoder.field(torch.zeros(1, points, 3), k, v)
    assert compute.field(config, latent_tokens=latent_tokens, points=points).total == counter.get_total_flops()


@pytest.mark.parametrize(("preset", "mflop"), [("v2-0", 33.7), ("v2-0-turbo", 8.4), ("v2-mini", 23.2)])
def test_a_point_of_the_published_decoders(preset: str, mflop: float) -> None:
    chosen = PRESETS[preset]
    found = compute.field(chosen.config, latent_tokens=chosen.num_latents, points=1)
    assert found.total / 1e6 == pytest.approx(mflop, abs=0.05)


def test_keys_and_values_of_the_largest_shape() -> None:
    found = compute.keys_values(PRESETS["v2-0"].config, latent_tokens=3072)
    assert found.total / 1e12 == pytest.approx(1.86, abs=0.01)
    assert found.attention == 4 * 3072**2 * 1024 * 16
