"""The encoder that reads words: its context is nearly the words' vectors, and it is exported, checked and loaded like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan3d_client import contract
from hunyuan3d_client.shapes import embed_prompt
from hunyuan3d_client.shapes.words import ATTRIBUTES, NOUNS
from hunyuan3d_export import parity
from hunyuan3d_export.checkpoints import CheckpointError
from hunyuan3d_export.conditioner.checkpoint import load_conditioner, save_conditioner
from hunyuan3d_export.conditioner.config import WORDS_IMAGE_SIZE, ConditionerConfig, Words
from hunyuan3d_export.conditioner.weights import SHIPPED, ConditionerServing, ConditionerSource
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.pipeline import Named, find_pipeline

SOURCE = ConditionerSource.shipped("shapes")


@pytest.fixture(scope="module")
def encoder():
    return SOURCE.load()


def pixels(count=2):
    return torch.randn(count, 1, 3, WORDS_IMAGE_SIZE, WORDS_IMAGE_SIZE, generator=torch.Generator().manual_seed(3))


def test_the_weights_are_small_and_hold_the_words_of_prompts(encoder):
    manifest = json.loads(SHIPPED["shapes"].with_suffix(".json").read_text())
    assert SHIPPED["shapes"].stat().st_size < 3_000_000 and manifest["sha256"] == sha256(SHIPPED["shapes"])
    assert encoder.config.words == Words(tokens=3, vocabulary=1 + len(ATTRIBUTES) + len(NOUNS))
    words = np.concatenate([embed_prompt(word) for word in (*ATTRIBUTES, *NOUNS)])
    nothing, *others = encoder.head.vectors.numpy()
    assert not nothing.any(), "the word of a token that a short prompt does not need"
    np.testing.assert_array_equal(others, words.astype(np.float32))


def test_the_context_is_a_choice_of_words(encoder):
    with torch.inference_mode():
        context, hidden = encoder(pixels()), encoder.hidden(pixels())
    assert context.shape == (2, 3, contract.CONTEXT_WIDTH) and context.dtype == torch.float16
    scores = encoder.head.scores(hidden[:, 0, 0])
    chosen = encoder.head.vectors[scores.argmax(-1)]
    # Less than a twentieth of "flat" beside NOTHING's zeros is drawn as "flat", because the denoiser normalises its tokens.
    torch.testing.assert_close(context.float(), chosen, rtol=0, atol=1e-3)


def test_a_checkpoint_is_read_as_it_was_written(encoder, tmp_path: Path):
    save_conditioner(encoder, tmp_path / "again.safetensors", dtype=torch.float32)
    again = load_conditioner(tmp_path / "again.safetensors", image_size=WORDS_IMAGE_SIZE, views=1)
    torch.testing.assert_close(again(pixels()), encoder(pixels()), rtol=0, atol=0)


def test_a_head_without_its_vectors_is_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(SHIPPED["shapes"])
    del state["conditioner.head.vectors"]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="must hold a DINOv2 of width 1536"):
        load_conditioner(tmp_path / "broken.safetensors", image_size=WORDS_IMAGE_SIZE, views=1)


def test_its_pictures_have_one_size():
    with pytest.raises(ValueError, match="image size must be one of 112, got 518"):
        ConditionerConfig(
            hidden_size=128, depth=1, mlp_ratio=4, gated=False, image_size=518, views=1, words=Words(tokens=3, vocabulary=19)
        )


def test_its_graph_computes_what_torch_computes(tmp_path: Path):
    (folder,) = export_onnx(SOURCE, tmp_path, options=OnnxOptions(precision="fp32"))
    manifest = Manifest.read(folder, hint="")
    assert manifest.serving == {"image_size": WORDS_IMAGE_SIZE, "views": 1}
    assert manifest.made_from["weights"]["variant"] == "shapes"
    (checks,) = parity.verify(tmp_path).values()
    assert all(check.passed for check in checks)


def test_the_preset_is_a_whole_pipeline(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    sources = find_pipeline(Named(preset="shapes")).sources
    assert list(sources) == ["dit", "conditioner", "vae"]
    assert sources["conditioner"].serving() == ConditionerServing(WORDS_IMAGE_SIZE, 1)
    assert sources["vae"].serving().scale_factor == 3.0
    assert all("checkpoint_sha256" in source.identity() for source in sources.values())
    assert list(find_pipeline(Named(preset="tiny")).sources) == ["dit"]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert list(find_pipeline(Named(preset="shapes")).sources) == ["dit", "vae"]
    assert "transformers is not installed; hint: " in caplog.text
