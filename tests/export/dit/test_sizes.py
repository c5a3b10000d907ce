"""Profiles and the memory pool follow the preset and the sampler's token limit."""

from __future__ import annotations

import json

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.dit.configs import config_files
from hunyuan3d_export.dit.network import facts, plan_sizes
from hunyuan3d_export.dit.sizes import MAX_TOKENS, memory_pool_bytes, plan_profile

BASE = [name for name, preset in PRESETS.items() if not preset.config.guidance_embed]


@pytest.mark.parametrize("name", PRESETS)
def test_a_profile_keeps_to_the_token_limit(name: str) -> None:
    preset = PRESETS[name]
    profile = plan_profile(preset)
    assert (profile["L"].opt, profile["T"].opt) == (preset.num_latents, preset.context_tokens)
    rows, latent_tokens, context_tokens = (profile[axis].max for axis in "BLT")
    assert rows * (latent_tokens + context_tokens) <= MAX_TOKENS, "the contract's largest sizes have twice as many"
    assert (rows + 1) * (preset.num_latents + context_tokens) > MAX_TOKENS or rows == contract.AXES["B"].max
    for axis, size in profile.items():
        assert contract.AXES[axis].min <= size.min and size.max <= contract.AXES[axis].max
    for axis, sizes in plan_sizes(preset).items():
        assert profile[axis].min <= min(sizes) and max(sizes) <= profile[axis].max, axis


def test_the_profiles_of_the_published_sizes() -> None:
    found = {name: [(size.min, size.opt, size.max) for size in plan_profile(PRESETS[name]).values()] for name in PRESETS}
    assert found["v2-0"] == [(1, 2, 8), (1, 3072, 3072), (1, 1370, 1370)]
    assert found["v2-mini"] == [(1, 2, 8), (1, 512, 3072), (1, 1370, 1370)]
    assert found["v2-mv"] == [(1, 2, 4), (1, 3072, 3404), (1, 5480, 5480)]
    assert found["v2-mini-turbo"] == [(1, 2, 4), (1, 3072, 3554), (1, 5330, 5330)]


@pytest.mark.parametrize("name", [name for name in BASE if name != "v2-mv"])
def test_plans_of_one_view_accept_the_warm_up_in_git(name: str) -> None:
    """They can be deployed in place, beside the configs of v2-0."""
    profile = plan_profile(PRESETS[name])
    for axis, sizes in plan_sizes(PRESETS["v2-0"]).items():
        assert profile[axis].min <= min(sizes) and max(sizes) <= profile[axis].max, axis


@pytest.mark.parametrize("name", ["tiny", "v2-mini", "v2-mv"])
def test_a_plan_warms_up_at_the_presets_sizes(name: str) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    preset = PRESETS[name]
    config = text_format.Parse(config_files(preset)[f"{contract.DIT}/config.pbtxt"], pb.ModelConfig())
    inputs = config.model_warmup[0].inputs
    assert [list(inputs[tensor].dims)[0] for tensor in ("latents", "context")] == [preset.num_latents, preset.context_tokens]
    assert config.max_batch_size == plan_profile(preset)["B"].max


def test_the_pool_holds_two_calls_at_the_largest_sizes() -> None:
    context, latents = 5480 * 1536 * 2, 3404 * 64 * 4
    assert memory_pool_bytes(PRESETS["v2-mv"]) == 2 * 4 * (context + 2 * latents + 4 + 4) > 64 << 20
    distilled = memory_pool_bytes(PRESETS["v2-mv-turbo"])
    assert distilled == memory_pool_bytes(PRESETS["v2-mv"]), "guidance in place of guidance_scale"
    (text,) = facts(PRESETS["v2-mv"]).values()
    assert json.loads(text)["cuda_memory_pool_bytes"] == memory_pool_bytes(PRESETS["v2-mv"])
