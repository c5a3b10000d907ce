"""One checkpoint, one pipeline: which networks a file or folder holds, and the facts that its config.yaml adds."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints_of_the_hub import SCALE_FACTOR, config, write_checkpoint, write_folder
from safetensors.torch import save_file

from hunyuan3d_export.checkpoints import CheckpointError
from hunyuan3d_export.commands import artifacts
from hunyuan3d_export.commands.deployment import deploy as deploy_command
from hunyuan3d_export.conditioner.weights import ConditionerServing
from hunyuan3d_export.described import Described, read_described
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.networks import NETWORKS
from hunyuan3d_export.onnx_from_torch import OnnxOptions
from hunyuan3d_export.pipeline import PROBES, Named, encoder_sizes, find_pipeline
from hunyuan3d_export.shapevae.weights import ShapeVAESource


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base pipeline's file with all parts."""
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "pipeline.safetensors")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A turbo pipeline's folder with all parts."""
    return write_folder(tmp_path_factory.mktemp("hub") / "hunyuan3d-dit-v9-turbo")


def test_every_network_has_a_probe() -> None:
    assert [*PROBES, "background"] == list(NETWORKS), "whose weights come from a file of their own"


def test_a_file_gives_every_network_that_it_holds(whole: Path, tmp_path: Path) -> None:
    found = find_pipeline(Named(checkpoint=whole))
    assert found.name == f"{whole.parent.name}-pipeline" and list(found.sources) == list(PROBES)
    assert all(source.checkpoint == whole for source in found.sources.values())
    assert found.sources["dit"].serving().name == found.sources["vae"].serving().name == "tiny"
    for name in PROBES:
        assert list(find_pipeline(Named(checkpoint=whole, networks=(name,))).sources) == [name]
    alone = write_checkpoint(tmp_path / "model.ckpt.safetensors", parts=("model",))
    assert list(find_pipeline(Named(checkpoint=alone)).sources) == ["dit"]


def test_ckpt_files_of_nested_parts_are_looked_into(whole: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(whole).items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    torch.save(parts, tmp_path / "pipeline.ckpt")
    assert list(find_pipeline(Named(checkpoint=tmp_path / "pipeline.ckpt")).sources) == list(PROBES)


def test_a_folder_needs_no_preset(turbo: Path) -> None:
    found = find_pipeline(Named(checkpoint=turbo))
    assert found.name == "hunyuan3d-dit-v9-turbo" and list(found.sources) == list(PROBES)
    preset, vae = found.sources["dit"].serving(), found.sources["vae"].serving()
    assert (preset.schedule, preset.steps, preset.config.guidance_embed) == ("consistency", 5, True)
    assert (vae.scale_factor, vae.include_pi) == (SCALE_FACTOR, False)
    of_file = find_pipeline(Named(checkpoint=turbo / "model.fp16.safetensors"))
    assert of_file.sources == found.sources and of_file.name == "hunyuan3d-dit-v9-turbo-model.fp16"
    assert find_pipeline(Named(checkpoint=turbo.parent, subfolder=turbo.name)) == found
    named = find_pipeline(Named(checkpoint=turbo, preset="v2-mini-fast")).sources["dit"].serving()
    assert (named.schedule, named.num_latents) == ("flow_match", 512), "a preset that is named wins"


def test_without_its_config_distilled_weights_still_need_a_preset(turbo: Path, tmp_path: Path) -> None:
    shutil.copy(turbo / "model.fp16.safetensors", tmp_path)
    with pytest.raises(ValueError, match="preset must be named for guidance-distilled weights"):
        find_pipeline(Named(checkpoint=tmp_path)).sources["dit"].serving()


@pytest.mark.parametrize(
    ("settings", "preset"),
    [
        ({}, "v2-0-turbo"),
        ({"consistency": False}, "v2-0-fast"),
        ({"guidance_embed": False, "consistency": False}, "v2-0"),
        ({"mini": True}, "v2-mini-turbo"),
        ({"mini": True, "consistency": False}, "v2-mini-fast"),
        ({"mini": True, "guidance_embed": False, "consistency": False}, "v2-mini"),
        ({"views": True}, "v2-mv-turbo"),
        ({"views": True, "consistency": False}, "v2-mv-fast"),
        ({"views": True, "guidance_embed": False, "consistency": False}, "v2-mv"),
    ],
    ids=str,
)
def test_the_variant_is_read_from_the_config(settings: dict[str, Any], preset: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(**settings)))
    assert read_described(tmp_path / "config.yaml") == Described(preset, SCALE_FACTOR, False)


def test_a_config_that_says_little_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    vae = {"target": "hy3dgen.shapegen.models.ShapeVAE", "params": {"scale_factor": 1.5}}
    for values, expected in (
        (vae, Described(None, 1.5, True)),  # upstream's include_pi is true where its config is silent
        ({"other": 3}, Described()),
        ([], Described()),
        (None, Described()),
    ):
        path.write_text(yaml.safe_dump(values))
        assert read_described(path) == expected
    path.write_text("a: [")
    with pytest.raises(ValueError, match=r"config.yaml must be YAML, got: .*\nhint: download it again"):
        read_described(path)


def test_the_encoder_has_the_size_and_views_of_the_preset(whole: Path) -> None:
    for preset, (size, views) in {
        "v2-0": (518, 1), "v2-mini-turbo": (1022, 1), "v2-mv-fast": (518, 4), "shapes": (518, 1)
    }.items():  # fmt: skip
        assert encoder_sizes(preset) == {"image_size": size, "views": views}, preset
    tokens = {name: preset.context_tokens for name, preset in PRESETS.items() if name != "shapes"}
    for name, count in tokens.items():
        sizes = encoder_sizes(name)
        assert sizes["views"] * (1 + (sizes["image_size"] // 14) ** 2) == count
    found = find_pipeline(Named(checkpoint=whole, preset="v2-mv", networks=("conditioner",))).sources["conditioner"].serving()
    assert found == ConditionerServing(518, 4)


def test_a_pipeline_without_a_vae_names_the_option_that_adds_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Path
) -> None:
    bare = write_folder(tmp_path / "dit", parts=("model", "conditioner"))
    assert list(find_pipeline(Named(checkpoint=bare)).sources) == ["dit", "conditioner"]
    assert "holds no shape decoder; hint: --vae FILE" in caplog.text
    with pytest.raises(ValueError, match=r"must hold the weights of the shape decoder, found those of dit.*\nhint: --vae FILE"):
        find_pipeline(Named(checkpoint=bare, networks=("vae",)))
    own = write_folder(tmp_path / "vae", {**config()["vae"], "params": {"scale_factor": 0.5}}, parts=("vae",))
    caplog.clear()
    found = find_pipeline(Named(checkpoint=bare, vae=own)).sources
    assert list(found) == list(PROBES) and caplog.text == ""
    assert found["vae"].checkpoint == own / "model.fp16.safetensors"
    assert (found["vae"].serving().scale_factor, found["vae"].serving().include_pi) == (0.5, True)
    file = write_checkpoint(tmp_path / "decoder.safetensors", parts=("vae",))
    assert find_pipeline(Named(checkpoint=bare, vae=file)).sources["vae"].serving().scale_factor == SCALE_FACTOR
    replaced = find_pipeline(Named(checkpoint=whole, vae=file)).sources["vae"]
    assert replaced == ShapeVAESource(path=file, preset="tiny"), "it replaces the checkpoint's own"


def test_what_cannot_be_found_is_said(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="network must be one of dit, conditioner, vae, background, got 'mesh'"):
        find_pipeline(Named(checkpoint=whole, networks=("mesh",)))
    with pytest.raises(FileNotFoundError, match="found a folder at .* without model"):
        find_pipeline(Named(checkpoint=tmp_path))
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        find_pipeline(Named(checkpoint=tmp_path / "none"))
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="must hold a DiT"):
        find_pipeline(Named(checkpoint=tmp_path / "other.safetensors")).sources["dit"].serving()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="transformers must be installed .*\nhint: .*: --network dit --network vae"):
        find_pipeline(Named(checkpoint=whole))
    assert list(find_pipeline(Named(checkpoint=whole, networks=("dit", "vae"))).sources) == ["dit", "vae"]


def test_a_preset_alone_gives_the_denoiser_or_the_networks_that_are_named() -> None:
    assert list(find_pipeline(Named(preset="tiny")).sources) == ["dit"]
    found = find_pipeline(Named(preset="tiny", seed=3, networks=("vae", "conditioner", "dit"))).sources
    assert list(found) == list(PROBES) and {vars(source)["seed"] for source in found.values()} == {3}
    with pytest.raises(ValueError, match="weights must come from a preset or a checkpoint, got neither"):
        find_pipeline(Named())
    with pytest.raises(ValueError, match="subfolder must come with a checkpoint, got sub alone"):
        find_pipeline(Named(preset="tiny", subfolder="sub"))


def test_options_and_graphs_reach_the_networks_that_have_them(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, exports = find_pipeline(Named(checkpoint=whole)), []
    monkeypatch.setattr(
        artifacts,
        "export_onnx",
        lambda source, *_, graph, options: exports.append((source.network, graph, options.choices)) or [],
    )
    artifacts.export_all(pipeline, tmp_path, OnnxOptions(choices={"guided_form": "repeat"}))
    artifacts.export_all(pipeline, tmp_path, OnnxOptions(), graph="field")
    chosen = {"guided_form": "repeat"}
    assert exports == [("dit", "all", chosen), ("conditioner", "all", {}), ("vae", "all", {}), ("vae", "field", {})]
    monkeypatch.undo()
    for graph, options, message in (
        ("both", OnnxOptions(), "graph must be one of plain, guided, all, got 'both'"),
        ("field", OnnxOptions(choices=chosen), "graph option must be one of none, got 'guided_form'"),
        ("all", OnnxOptions(choices={"wrong": "x"}), "graph option must be one of guided_form, .*got 'wrong'"),
    ):
        with pytest.raises(ValueError, match=message):
            artifacts.export_all(pipeline, tmp_path, options, graph=graph)


def test_a_checkpoint_for_the_torch_runtime_leaves_out_what_has_none(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        deploy_command(checkpoint=whole, repository=tmp_path / "repository")
    assert "the image encoder has no torch runtime, left out; hint: deploy its graph" in caplog.text
    for network in ("dit", "vae"):
        assert (tmp_path / "repository" / NETWORKS[network].models[0] / "1" / "checkpoint.safetensors").is_file()
    with pytest.raises(ValueError, match="must be of a network with a torch runtime, got conditioner"):
        deploy_command(checkpoint=whole, repository=tmp_path / "repository", network=["conditioner"])
