"""The table of variants, and what an official config.yaml may say."""

from __future__ import annotations

import dataclasses
import doctest
from typing import Any

import pytest
import torch

from hunyuan3d_export.dit import PRESETS, DiTConfig, Hunyuan3DDiT, config

OFFICIAL = {
    "in_channels": 64,
    "context_in_dim": 1536,
    "hidden_size": 1024,
    "mlp_ratio": 4.0,
    "num_heads": 16,
    "depth": 16,
    "depth_single_blocks": 32,
    "axes_dim": [64],
    "theta": 10000,
    "qkv_bias": True,
    "time_factor": 1000.0,
    "guidance_embed": False,
}

# name: parameters, keys, double and single blocks, L, T, schedule, steps, scale factor
PUBLISHED = {
    "v2-0": (1_113_274_432, 652, 16, 32, 3072, 1370, "flow_match", 50, 0.9990943042622529),
    "v2-0-fast": (1_114_587_200, 656, 16, 32, 3072, 1370, "flow_match", 50, 0.9990943042622529),
    "v2-0-turbo": (1_114_587_200, 656, 16, 32, 3072, 1370, "consistency", 5, 0.9990943042622529),
    "v2-mini": (559_196_224, 332, 8, 16, 512, 1370, "flow_match", 50, 1.0188137142395404),
    "v2-mini-fast": (560_508_992, 336, 8, 16, 512, 1370, "flow_match", 50, 1.0188137142395404),
    "v2-mini-turbo": (560_508_992, 336, 8, 16, 3072, 5330, "consistency", 5, 1.0188137142395404),
    "v2-mv": (1_113_274_432, 652, 16, 32, 3072, 5480, "flow_match", 50, 0.9990943042622529),
    "v2-mv-fast": (1_114_587_200, 656, 16, 32, 3072, 5480, "flow_match", 50, 0.9990943042622529),
    "v2-mv-turbo": (1_114_587_200, 656, 16, 32, 3072, 5480, "consistency", 5, 0.9990943042622529),
}


def test_presets_are_the_published_ones_and_this_projects_own() -> None:
    assert {name for name in PRESETS if name.startswith("v2-")} == set(PUBLISHED)
    assert "tiny" in PRESETS
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_size_and_sampling_defaults(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        model = Hunyuan3DDiT(preset.config)
    found = (
        sum(parameter.numel() for parameter in model.parameters()),
        len(model.state_dict()),
        preset.config.depth,
        preset.config.depth_single_blocks,
        preset.num_latents,
        preset.context_tokens,
        preset.schedule,
        preset.steps,
        preset.scale_factor,
    )
    assert found == PUBLISHED[name]


def test_state_dict_keys_and_shapes_of_v2_0() -> None:
    with torch.device("meta"):
        state = Hunyuan3DDiT(PRESETS["v2-0"].config).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {
        "latent_in.weight": (1024, 64),
        "time_in.in_layer.weight": (1024, 256),
        "time_in.out_layer.bias": (1024,),
        "cond_in.weight": (1024, 1536),
        "double_blocks.15.img_mod.lin.weight": (6144, 1024),
        "double_blocks.15.txt_attn.qkv.weight": (3072, 1024),
        "double_blocks.15.txt_attn.norm.query_norm.scale": (64,),
        "double_blocks.0.img_attn.proj.bias": (1024,),
        "double_blocks.0.img_mlp.0.weight": (4096, 1024),
        "double_blocks.0.txt_mlp.2.weight": (1024, 4096),
        "single_blocks.31.linear1.weight": (7168, 1024),
        "single_blocks.31.linear2.weight": (1024, 5120),
        "single_blocks.31.norm.key_norm.scale": (64,),
        "single_blocks.31.modulation.lin.bias": (3072,),
        "final_layer.linear.weight": (64, 1024),
        "final_layer.adaLN_modulation.1.weight": (2048, 1024),
    }
    assert {key: shapes[key] for key in expected} == expected


def test_the_keyword_form_of_the_docstring_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(DiTConfig, "DiTConfig", globs=vars(config))
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=2)


def test_from_upstream_takes_the_official_params() -> None:
    assert DiTConfig.from_upstream(OFFICIAL) == PRESETS["v2-0"].config
    assert DiTConfig.from_upstream({**OFFICIAL, "guidance_embed": True}) == PRESETS["v2-0-turbo"].config


def test_from_upstream_needs_no_key_the_network_does_not_depend_on() -> None:
    optional = {"axes_dim", "theta", "qkv_bias", "time_factor", "guidance_embed"}
    assert DiTConfig.from_upstream({k: v for k, v in OFFICIAL.items() if k not in optional}) == PRESETS["v2-0"].config


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(DiTConfig) if f.name != "guidance_embed"])
def test_from_upstream_names_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=f"got none for {name}"):
        DiTConfig.from_upstream({k: v for k, v in OFFICIAL.items() if k != name})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depht", 16, "unknown keys depht\nhint: pass model.params"),
        ("axes_dim", [32], "axes_dim must be a list that sums to the head size 64"),
        ("axes_dim", 64, "axes_dim must be a list"),
        ("theta", 0, "theta must be a positive number"),
        ("theta", "10000", "theta must be a positive number"),
        ("qkv_bias", False, "qkv_bias must be true"),
        ("time_factor", 1.0, "time_factor must be 1000, got 1.0"),
        ("guidance_embed", "false", "guidance_embed must be of type bool, got 'false'"),
        ("guidance_embed", 1, "guidance_embed must be of type bool, got 1"),
        ("hidden_size", "1024", "hidden_size must be of type int"),
        ("depth", 16.0, "depth must be of type int"),
        ("depth", True, "depth must be of type int"),
        ("depth", 0, "depth must be positive, got 0"),
        ("num_heads", -1, "num_heads must be positive"),
        ("mlp_ratio", float("nan"), "mlp_ratio must be positive, got nan"),
        ("mlp_ratio", float("inf"), "mlp_ratio must be positive, got inf"),
        ("num_heads", 15, "hidden_size must be a multiple of num_heads=15, got 1024"),
    ],
)
def test_from_upstream_refuses(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        DiTConfig.from_upstream({**OFFICIAL, key: value})


def test_config_and_presets_are_immutable(narrow: DiTConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        narrow.depth = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].steps = 3  # type: ignore[misc]
