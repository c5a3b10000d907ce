"""Every layout in which the decoder's weights are published, the config derived from them, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hunyuan3d_export.dit import PRESETS as DIT_PRESETS
from hunyuan3d_export.dit import random_model as random_dit
from hunyuan3d_export.shapevae import (
    PRESETS,
    CheckpointError,
    ShapeVAEConfig,
    ShapeVAEDecoder,
    ShapeVAEPreset,
    load_checkpoint,
    random_model,
    save_checkpoint,
)
from hunyuan3d_export.shapevae.weights import ShapeVAESource

State = dict[str, Tensor]
ENCODER = {"encoder.input_proj.weight": torch.zeros(4, 3), "encoder.self_attn.resblocks.0.ln_1.weight": torch.ones(3)}
ENCODER["pre_kl.weight"] = torch.zeros(2, 2)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# Layout -> the file's content for a decoder's state dict; a nested one needs a pickle.
LAYOUTS: dict[str, Callable[[State], Any]] = {
    "a VAE alone": lambda state: state,
    "with its encoder": lambda state: {**ENCODER, **state},
    "part of a shape pipeline": lambda state: {
        **prefixed("vae.", {**ENCODER, **state}),
        "model.latent_in.weight": torch.zeros(2, 2),
        "conditioner.main_image_encoder.model.embeddings.cls_token": torch.zeros(1),
    },
    "a pickle of parts": lambda state: {"vae": state, "model": {"latent_in.weight": torch.zeros(2, 2)}, "step": 3},
    "a training state": lambda state: {"state_dict": prefixed("module.", state)},
}


def written(content: Any, folder: Path) -> Path:
    nested = any(not isinstance(value, Tensor) for value in content.values())
    path = folder / ("model.ckpt" if nested else "model.safetensors")
    torch.save(content, path) if nested else save_file({k: v.contiguous() for k, v in content.items()}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstreams_own_weights(layout: str, config: ShapeVAEConfig, build: Callable[..., Any], tmp_path: Path) -> None:
    theirs = build(config, random_model(config, seed=7).state_dict(), torch.float32)
    loaded = load_checkpoint(written(LAYOUTS[layout](theirs.state_dict()), tmp_path))
    # The size of a head is invisible without norms of queries and keys, so it is the usual 64 there.
    assert loaded.config == config and not loaded.training and loaded.dtype == torch.float32
    for name, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("seed", range(6))
def test_any_sizes_of_upstreams_classes(
    seed: int, build: Callable[..., Any], draw: Callable[..., tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=random))]

    ratio, head = pick(1, 2, 4), pick(16, 24, 64)
    heads = ratio * pick(1, 3)
    config = ShapeVAEConfig(
        embed_dim=pick(8, 64),
        width=heads * head,
        heads=heads,
        num_decoder_layers=pick(1, 3, 11),
        geo_decoder_downsample_ratio=ratio,
        geo_decoder_mlp_expand_ratio=pick(1, 2, 4),
        geo_decoder_ln_post=pick(True, False),
        num_freqs=pick(1, 6, 8),
        qkv_bias=pick(True, False),
        qk_norm=True,
    )
    theirs = build(config, random_model(config, seed).state_dict(), torch.float64)
    torch.save(theirs.state_dict(), tmp_path / "model.fp16.ckpt")
    ours = load_checkpoint(tmp_path / "model.fp16.ckpt")
    assert ours.config == config
    latents, queries = draw(config.embed_dim, 2, 7, 11, torch.float64)
    expected = theirs.geo_decoder(queries, latents=theirs(latents)).squeeze(-1)
    torch.testing.assert_close(ours.field(queries, *ours.keys_values(latents)), expected, rtol=0, atol=1e-10)


def test_saved_and_loaded_again(config: ShapeVAEConfig, tmp_path: Path) -> None:
    model = random_model(config, seed=1)
    save_checkpoint(model, tmp_path / "checkpoint.safetensors", dtype=None)
    loaded = load_checkpoint(tmp_path / "checkpoint.safetensors", dtype=torch.float16)
    assert loaded.dtype == torch.float16 and loaded.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half())


VARIANTS = {
    "v2-0": "v2-0, v2-0-fast, v2-mini, v2-mini-fast, v2-mv, v2-mv-fast",
    "v2-0-turbo": "v2-0-turbo, v2-mini-turbo, v2-mv-turbo",
}


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("v2-0", "post_kl.bias"),
        ("v2-0", "geo_decoder.ln_post.weight"),
        ("v2-0", "geo_decoder.cross_attn_decoder.attn.attention.q_norm.bias"),
        ("v2-0", "transformer.resblocks.0.mlp.c_proj.weight"),
        ("v2-0-turbo", "geo_decoder.latents_proj.weight"),
        ("v2-0-turbo", "geo_decoder.output_proj.bias"),
    ],
)
def test_a_missing_key_is_named_with_the_likely_variant(variant: str, missing: str, tmp_path: Path) -> None:
    state = one_block_of(variant)
    del state[missing]
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(written(state, tmp_path))
    assert f"missing {missing}" in str(raised.value) and f"one of {VARIANTS[variant]})" in str(raised.value)


def one_block_of(variant: str) -> State:
    """A state dict of the variant's sizes with a single block."""
    config = dataclasses.replace(PRESETS[variant].config, num_decoder_layers=1)
    with torch.device("meta"):
        shapes = ShapeVAEDecoder(config).state_dict()
    return {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in shapes.items()}


@pytest.mark.parametrize("missing", ["post_kl.weight", "geo_decoder.query_proj.weight"])
def test_a_missing_key_that_the_sizes_are_read_from(missing: str, tmp_path: Path) -> None:
    state = random_model(PRESETS["tiny"].config).state_dict()
    del state[missing]
    with pytest.raises(CheckpointError, match=f"must hold all keys of a ShapeVAE decoder, missing {missing}"):
        load_checkpoint(written(prefixed("vae.", state), tmp_path))


def test_an_unknown_key_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    state = random_model(PRESETS["tiny"].config).state_dict()
    state["geo_decoder.colour_proj.weight"] = torch.zeros(3, 3)
    state["transformer.resblocks.1.ln_1.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(written(state, tmp_path))
    assert "unexpected geo_decoder.colour_proj.weight" in str(raised.value) and "of no published variant" in str(raised.value)
    assert "transformer.resblocks.1.ln_1.bias must be [128], got [5]" in str(raised.value)


def test_a_stray_block_does_not_make_a_model_of_a_million(tmp_path: Path) -> None:
    state = random_model(PRESETS["tiny"].config).state_dict()
    state["transformer.resblocks.1000000.ln_1.bias"] = torch.zeros(128)
    with pytest.raises(CheckpointError, match="numbered without gaps, got 1000000 among"):
        load_checkpoint(written(state, tmp_path))


def test_a_file_without_a_vae(tmp_path: Path) -> None:
    path = written({"model.latent_in.weight": torch.zeros(2, 2), "conditioner.x": torch.zeros(1)}, tmp_path)
    with pytest.raises(CheckpointError, match="must hold a ShapeVAE .*, found the parts conditioner, model\nhint: pass the"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="checkpoint must be a .safetensors or .ckpt file, found a folder at"):
        load_checkpoint(tmp_path)


def test_mixed_dtypes(tmp_path: Path) -> None:
    state = random_model(PRESETS["tiny"].config).state_dict()
    state["post_kl.bias"] = state["post_kl.bias"].half()
    path = written(state, tmp_path)
    with pytest.raises(CheckpointError, match="weights of one floating-point type, got float16, float32"):
        load_checkpoint(path)
    assert load_checkpoint(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_presets_are_those_of_the_denoiser() -> None:
    assert list(PRESETS) == list(DIT_PRESETS)
    for name, preset in PRESETS.items():
        assert preset.scale_factor == DIT_PRESETS[name].scale_factor and not preset.include_pi
        assert preset.config.geo_heads == (2 if name in ("tiny", "shapes") else 8 if name.endswith("turbo") else 16)


@pytest.mark.parametrize(("variant", "parameters", "keys"), [("v2-0", 214_212_865, 266), ("v2-0-turbo", 203_690_497, 262)])
def test_parameters_of_the_published_variants(variant: str, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        state = ShapeVAEDecoder(PRESETS[variant].config).state_dict()
    assert sum(value.numel() for value in state.values()) == parameters and len(state) == keys


def test_a_pipelines_file_shows_its_own_scale_factor(tmp_path: Path) -> None:
    vae = prefixed("vae.", random_model(PRESETS["tiny"].config).state_dict())
    dit = random_dit(dataclasses.replace(DIT_PRESETS["tiny"].config, depth_single_blocks=1)).state_dict()
    tiny = prefixed("model.", random_dit(DIT_PRESETS["tiny"].config).state_dict())
    path = written({**vae, **tiny}, tmp_path)
    assert ShapeVAESource(path=path).serving() == PRESETS["tiny"]
    assert ShapeVAESource(path=path, preset="v2-mini").serving().scale_factor == PRESETS["v2-mini"].scale_factor
    custom = written({**vae, **prefixed("model.", dit)}, tmp_path)
    with pytest.raises(ValueError, match="preset must be named for .*, whose DiT has no published size\nhint: pass --preset"):
        ShapeVAESource(path=custom).serving()
    alone = written(vae, tmp_path)
    with pytest.raises(
        ValueError, match="because a VAE's weights do not show the scale factor .*\nhint: pass --preset with one of"
    ):
        ShapeVAESource(path=alone).serving()
    found = ShapeVAESource(path=alone, scale_factor=1.0039506158752403).serving()
    assert (found.name, found.scale_factor, found.config) == ("custom", 1.0039506158752403, PRESETS["tiny"].config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be positive, got 0"),
        ({"heads": True}, "heads must be of type int, got True"),
        ({"qk_norm": "false"}, "qk_norm must be of type bool, got 'false'"),
        ({"heads": 5}, "width must be a multiple of 5, got 128"),
        ({"geo_decoder_downsample_ratio": 4}, "heads must be a multiple of 4, got 2"),
    ],
)
def test_sizes_that_fit_no_decoder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"].config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys_values": "BF16"}, "keys_values must be FP16 or FP32, got 'BF16'"),
        ({"scale_factor": 0.0}, "scale_factor must be positive, got 0.0"),
    ],
)
def test_facts_that_fit_no_preset(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **changes)
    wide = dataclasses.replace(PRESETS["tiny"].config, heads=1)
    with pytest.raises(ValueError, match="must have 64 latent channels and head size 64, got 64 and 128"):
        ShapeVAEPreset(name="wide", config=wide, num_latents=8, scale_factor=1.0)


@pytest.mark.parametrize(
    ("source", "message"), [({}, "VAE must come from a preset or a checkpoint, got neither\nhint: "), ({"preset": "v3"}, "preset must be one of tiny, .*, got 'v3'")]
)  # fmt: skip
def test_wrong_sources(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapeVAESource(**source)
