"""The sources of weights, the identities that name weights, and the sampling defaults that belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hunyuan3d_export.dit import PRESETS, CheckpointError
from hunyuan3d_export.dit.weights import CUSTOM, Weights
from hunyuan3d_export.files import sha256
from hunyuan3d_export.precisions import PRECISIONS

TINY = PRESETS["tiny"].config


def test_identity_names_the_numbers(micro: Weights, micro_weights: Callable[..., Weights]) -> None:
    assert Weights(preset="tiny", seed=3).identity() == {"preset": "tiny", "seed": 3}
    assert micro.checkpoint is not None
    assert micro.identity() == {"preset": None, "checkpoint_sha256": sha256(micro.checkpoint)}
    assert micro_weights(seed=1).identity() != micro.identity()


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_load(dtype: torch.dtype, micro: Weights) -> None:
    for weights in (micro, Weights(preset="tiny", seed=2)):
        model = weights.load(dtype)
        assert model.dtype == dtype and not model.training and model.config == weights.config()
        assert {value.dtype for value in model.state_dict().values()} == {dtype}


def test_the_seed_is_used() -> None:
    first, same, other = (Weights(preset="tiny", seed=seed).load(torch.float32).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset must be one of tiny, .*, got 'v3'"):
        Weights(preset="v3")
    with pytest.raises(ValueError, match="must come from a preset or a checkpoint, got neither\nhint: "):
        Weights()
    missing = Weights(checkpoint=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        missing.identity()
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        missing.config()
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(CheckpointError, match="must be a whole"):
        Weights(checkpoint=tmp_path / "empty.ckpt").config()


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.config.guidance_embed])
def test_base_weights_find_their_variant_by_size(name: str) -> None:
    found = Weights(checkpoint=Path("any")).sampling(PRESETS[name].config)
    assert found.config == PRESETS[name].config and not found.config.guidance_embed
    assert found.num_latents == next(preset for preset in PRESETS.values() if preset.config == found.config).num_latents


def test_weights_of_no_published_size_are_sampled_like_v2_0() -> None:
    config = dataclasses.replace(TINY, depth=7)
    assert Weights(checkpoint=Path("any")).sampling(config) == dataclasses.replace(PRESETS["v2-0"], name=CUSTOM, config=config)


def test_the_presets_defaults_go_with_a_checkpoint_of_another_size() -> None:
    config = dataclasses.replace(TINY, guidance_embed=True)
    found = Weights(preset="v2-mini-turbo", checkpoint=Path("any")).sampling(config)
    assert found == dataclasses.replace(PRESETS["v2-mini-turbo"], name=CUSTOM, config=config)
    same = Weights(preset="v2-mini", checkpoint=Path("any")).sampling(PRESETS["v2-mini"].config)
    assert same == PRESETS["v2-mini"]


def test_contradictions() -> None:
    distilled = dataclasses.replace(TINY, guidance_embed=True)
    with pytest.raises(
        ValueError, match="preset must be named for guidance-distilled weights.*\nhint: .*v2-0-fast, v2-0-turbo"
    ):
        Weights(checkpoint=Path("any")).sampling(distilled)
    with pytest.raises(ValueError, match="must fit the weights, got v2-0 for guidance-distilled weights\nhint: "):
        Weights(preset="v2-0", checkpoint=Path("any")).sampling(distilled)
    with pytest.raises(ValueError, match="must fit the weights, got v2-0-fast for base weights\nhint: "):
        Weights(preset="v2-0-fast", checkpoint=Path("any")).sampling(TINY)
    for other in ({"in_channels": 32}, {"context_in_dim": 1024}):
        with pytest.raises(ValueError, match="weights must have 64 latent channels and context width 1536, got "):
            Weights(checkpoint=Path("any")).sampling(dataclasses.replace(TINY, **other))
