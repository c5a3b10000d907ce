"""The same weights in the official code and in ours give the same velocity.

The official file is loaded by its path: importing its package would need mesh libraries. It is never imported outside tests.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.dit import DiTConfig, Hunyuan3DDiT, random_model

# (B, L, T): the sizes within a shape differ, so that no two axes can be confused, and each size is 1 once.
SHAPES = [(1, 5, 9), (2, 33, 17), (3, 8, 70), (4, 1, 2), (2, 19, 1)]
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def official() -> ModuleType:
    package = importlib.machinery.PathFinder.find_spec("hy3dgen")  # on disk, whatever sys.modules holds
    if package is None or not package.submodule_search_locations:
        pytest.skip("hy3dgen is not installed: pip install --no-deps hy3dgen==2.0.2")
    path = Path(package.submodule_search_locations[0]) / "shapegen" / "models" / "denoisers" / "hunyuan3ddit.py"
    spec = importlib.util.spec_from_file_location("official_hunyuan3ddit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["tiny", "narrow"])
def base(request: pytest.FixtureRequest) -> DiTConfig:
    config: DiTConfig = request.getfixturevalue(request.param)
    return config


def build(official: ModuleType, config: DiTConfig, dtype: torch.dtype) -> Any:
    model = official.Hunyuan3DDiT(**dataclasses.asdict(config), axes_dim=[config.head_dim])
    return model.to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("guidance_embed", [False, True])
def test_velocity_is_the_official_one(
    official: ModuleType,
    base: DiTConfig,
    guidance_embed: bool,
    dtype: torch.dtype,
    draw: Callable[..., tuple[Tensor, Tensor, Tensor]],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    config = dataclasses.replace(base, guidance_embed=guidance_embed)
    ours = random_model(config, seed=3, dtype=dtype)
    theirs = build(official, config, dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for shape in SHAPES:
        latents, t, context = draw(config, *shape, dtype)
        # Random t, both ends of the trajectory, and 48/49, which no float holds exactly: the angles 1000 t magnify its error.
        for times in (t, torch.zeros_like(t), torch.ones_like(t), torch.full_like(t, 48 / 49)):
            guidance = torch.linspace(1.3, 7.7, shape[0], dtype=dtype) if guidance_embed else None
            expected = theirs(latents, times, {"main": context}, guidance=guidance)
            found = ours(latents, times, context, guidance)
            assert found.dtype == dtype and found.shape == latents.shape
            assert relative_error(found, expected) <= TOLERANCE, (shape, times)


@pytest.mark.parametrize("guidance_embed", [False, True])
def test_state_dicts_load_strictly_both_ways(official: ModuleType, base: DiTConfig, guidance_embed: bool) -> None:
    config = dataclasses.replace(base, guidance_embed=guidance_embed)
    ours, theirs = random_model(config), build(official, config, torch.float32)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    Hunyuan3DDiT(config).load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    "part", ["latent_in.bias", "double_blocks.1.txt_attn.norm.key_norm.scale", "final_layer.linear.weight"]
)
def test_parity_would_notice_a_changed_parameter(
    official: ModuleType,
    narrow: DiTConfig,
    part: str,
    draw: Callable[..., tuple[Tensor, Tensor, Tensor]],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    ours, theirs = random_model(narrow, seed=3), build(official, narrow, torch.float32)
    state = ours.state_dict()
    theirs.load_state_dict({**state, part: state[part] * 1.01}, strict=True)
    latents, t, context = draw(narrow, 2, 33, 17)
    assert relative_error(ours(latents, t, context), theirs(latents, t, {"main": context})) > 10 * TOLERANCE


def test_official_params_build_the_same_network(official: ModuleType) -> None:
    params = {
        "in_channels": 4,
        "context_in_dim": 12,
        "hidden_size": 24,
        "mlp_ratio": 4.0,
        "num_heads": 3,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8],
        "theta": 10000,
        "qkv_bias": True,
    }
    theirs = official.Hunyuan3DDiT(**params)
    Hunyuan3DDiT(DiTConfig.from_upstream(params)).load_state_dict(theirs.state_dict(), strict=True)
