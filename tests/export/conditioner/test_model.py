"""The encoder in torch: against transformers' own forward, view vectors, positions, and weights in both key layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from hunyuan3d_export.conditioner import Conditioner, load_conditioner, random_conditioner
from hunyuan3d_export.conditioner.checkpoint import current_layout
from hunyuan3d_export.conditioner.model import resized_positions, view_vectors
from hunyuan3d_export.dit.checkpoint import CheckpointError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> Conditioner:
    return random_conditioner("tiny", seed=3)


def pixels(batch: int, views: int, size: int = 518) -> torch.Tensor:
    return torch.randn(batch, views, 3, size, size, generator=torch.Generator().manual_seed(1))


def layout_before_5(state: State) -> State:
    """The same weights under the names that transformers had before version 5."""
    old: State = {}
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}
    for key, value in state.items():
        if ".mlp.gate_proj." in key:
            other = state[key.replace("gate_proj", "up_proj")]
            old[key.replace("gate_proj", "weights_in")] = torch.cat([value, other])
        elif ".mlp.up_proj." not in key:
            key = re.sub(r"attention\.([qkvo]_proj)\.", lambda match: f"attention.{names[match[1]]}.", key)
            old[key.replace("mlp.down_proj", "mlp.weights_out")] = value
    return old


def test_it_is_transformers_own_forward(tiny: Conditioner) -> None:
    found = tiny(pixels(2, 1))
    expected = tiny.dinov2(pixels(2, 1)[:, 0]).last_hidden_state
    assert (found.shape, found.dtype) == ((2, 1370, 1536), torch.float16)
    torch.testing.assert_close(found, expected.half(), rtol=0, atol=4e-3)
    assert (found - found.mean(dim=1, keepdim=True)).std() > 0.5, "tokens must differ, or nothing was compared"


def test_giant_has_the_published_size() -> None:
    with torch.device("meta"):
        config = Dinov2Config(
            hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, mlp_ratio=4, use_swiglu_ffn=True, image_size=518
        )
        published = {key: value.shape for key, value in Dinov2Model(config).state_dict().items()}
        from hunyuan3d_export.conditioner.config import VARIANTS, ConditionerConfig

        depth, ratio = VARIANTS["giant"]
        sizes = {"image_size": 518, "views": 1}
        ours = Conditioner(ConditionerConfig(hidden_size=1536, depth=depth, mlp_ratio=ratio, gated=True, **sizes))
    assert {key: value.shape for key, value in ours.dinov2.state_dict().items()} == published
    assert sum(value.numel() for value in published.values()) == 1_136_480_768


def test_views_are_encoded_alone_marked_and_joined(tiny: Conditioner) -> None:
    several = random_conditioner("tiny", seed=3, views=4)
    inputs = pixels(1, 3)
    found = several(inputs)
    assert found.shape == (1, 3 * 1370, 1536)
    vectors = view_vectors(4, 1536)
    for view, part in enumerate(found.split(1370, dim=1)):
        alone = tiny(inputs[:, view : view + 1]).float() + vectors[view]
        torch.testing.assert_close(part.float(), alone, rtol=0, atol=8e-3)
        assert (part.float() - tiny(inputs[:, view : view + 1]).float()).abs().max() > 0.5


def test_view_vectors() -> None:
    vectors = view_vectors(4, 1536)
    assert vectors.shape == (4, 1536) and vectors[0, :768].eq(0).all() and vectors[0, 768:].eq(1).all()
    for view, index in ((1, 0), (2, 5), (3, 767)):
        angle = torch.tensor(view * 10_000 ** (-index / 768))
        torch.testing.assert_close(vectors[view, index], angle.sin())
        torch.testing.assert_close(vectors[view, 768 + index], angle.cos())


def test_1022_pixels_interpolate_the_positions_as_transformers_does(tiny: Conditioner) -> None:
    large = random_conditioner("tiny", seed=3)
    positions = tiny.dinov2.embeddings.position_embeddings
    expected = tiny.dinov2.embeddings.interpolate_pos_encoding(torch.zeros(1, 5330, 1536), 1022, 1022)
    torch.testing.assert_close(resized_positions(positions, 1022), expected)
    assert resized_positions(positions, 518) is positions
    assert large.config.tokens == 1370


@pytest.mark.parametrize("layout", ["current", "before 5"])
@pytest.mark.parametrize("prefix", ["conditioner.main_image_encoder.model.", "", "dinov2."])
def test_checkpoints(layout: str, prefix: str, tiny: Conditioner, tmp_path: Path) -> None:
    state = tiny.dinov2.state_dict()
    stored = layout_before_5(state) if layout == "before 5" else state
    assert (stored.keys() == state.keys()) == (layout == "current")
    stored = {prefix + key: value.contiguous() for key, value in stored.items()}
    if prefix.startswith("conditioner"):
        stored["model.latent_in.weight"] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_conditioner(path, image_size=518, views=1)
        assert loaded.config == tiny.config
        for key, value in loaded.dinov2.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_a_folder_that_transformers_wrote_and_a_pickled_pipeline(tiny: Conditioner, tmp_path: Path) -> None:
    tiny.dinov2.save_pretrained(tmp_path / "folder")
    state = layout_before_5(tiny.dinov2.state_dict())
    torch.save({"conditioner": {f"main_image_encoder.model.{key}": value for key, value in state.items()}}, tmp_path / "a.ckpt")
    for path in (tmp_path / "folder", tmp_path / "a.ckpt"):
        loaded = load_conditioner(path, image_size=518, views=1)
        torch.testing.assert_close(loaded(pixels(1, 1)), tiny(pixels(1, 1)))


def test_what_is_no_encoder_is_refused(tiny: Conditioner, tmp_path: Path) -> None:
    def refused(state: State, message: str) -> None:
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_conditioner(tmp_path / "x.safetensors", image_size=518, views=1)

    state = tiny.dinov2.state_dict()
    refused({"model.latent_in.weight": torch.zeros(1)}, "must hold one DINOv2 .*found the parts model\nhint: ")
    refused({**state, "more": torch.zeros(1)}, "must fit a DINOv2 exactly:\n  unexpected more")
    without = {key: value for key, value in state.items() if key != "layernorm.bias"}
    refused(without, "must fit a DINOv2 exactly:\n  missing layernorm.bias")
    refused({"embeddings.cls_token": torch.zeros(1, 1, 1536)}, "must hold all keys of a DINOv2, missing encoder")
    with pytest.raises(FileNotFoundError, match="conditioner must be a checkpoint or a folder"):
        load_conditioner(tmp_path / "nothing", image_size=518, views=1)
    with pytest.raises(ValueError, match="image size must be one of 518, 1022, got 224"):
        random_conditioner("tiny", image_size=224)
    with pytest.raises(ValueError, match="views must be one of 1, 4, got 3"):
        random_conditioner("tiny", views=3)
    with pytest.raises(ValueError, match="variant must be one of giant, tiny, got 'large'"):
        random_conditioner("large")


def test_a_missing_mask_token_is_no_problem(tiny: Conditioner, tmp_path: Path) -> None:
    state = current_layout(tiny.dinov2.state_dict())
    del state["embeddings.mask_token"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    torch.testing.assert_close(
        load_conditioner(tmp_path / "x.safetensors", image_size=518, views=1)(pixels(1, 1)), tiny(pixels(1, 1))
    )
