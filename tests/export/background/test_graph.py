"""ONNX files of every family behind the one interface: levels in, saliency out, for any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from saliency_models import write_model

from hunyuan3d_client import contract
from hunyuan3d_export.background import network
from hunyuan3d_export.background.families import FAMILIES
from hunyuan3d_export.background.weights import BackgroundServing, BackgroundSource
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.onnx_from_torch import export_onnx


def exported(path: Path, family: str, out: Path) -> Path:
    (folder,) = export_onnx(BackgroundSource(path=path, family=family), out)
    return folder


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_normalised_as_rembg_does(family: str, opset: int, tmp_path: Path) -> None:
    logits = FAMILIES[family].logits
    folder = exported(write_model(tmp_path / "a.onnx", logits=logits, opset=opset), family, tmp_path / "out")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["rgb"] and [each.name for each in session.get_outputs()] == [
        "saliency"
    ]
    levels = np.random.default_rng(1).integers(0, 200, (3, 3, 32, 32)).astype(np.float32)
    levels[1] *= 0.5  # each picture is divided by its own largest level
    found = session.run(None, {"rgb": levels})[0]
    mean, deviation = (np.array(each)[:, None, None] for each in (FAMILIES[family].mean, FAMILIES[family].deviation))
    scores = np.stack([8 * ((each / each.max() - mean) / deviation).mean(axis=0, keepdims=True) for each in levels])
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-scores)), atol=1e-5)
    assert np.isfinite(session.run(None, {"rgb": levels * 0})[0]).all(), "a black picture has no largest level"


def test_only_what_the_saliency_needs_stays(tmp_path: Path) -> None:
    folder = exported(write_model(tmp_path / "a.onnx"), "u2net", tmp_path / "out")
    graph = onnx.load(str(folder / "model.onnx")).graph
    assert "d1" not in {node.name for node in graph.node} and "unused" not in {each.name for each in graph.initializer}
    assert [each.op_type for each in graph.node] == ["ReduceMax", "Max", "Div", "Sub", "Div", "Conv", "Sigmoid", "Identity"]


def test_what_the_file_says_is_read(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.onnx", side=64)
    assert BackgroundSource(path=path, family="isnet").serving() == BackgroundServing("isnet", 64, contract.AXES["B"].max)
    free = write_model(tmp_path / "free.onnx", side="side")
    assert BackgroundSource(path=free, family="u2netp").serving().side == 320
    fixed = BackgroundSource(path=write_model(tmp_path / "fixed.onnx", fixed=True), family="u2net").serving()
    assert fixed.batch == 1


def test_a_file_that_fixes_the_batch_is_served_one_by_one(tmp_path: Path) -> None:
    folder = exported(write_model(tmp_path / "a.onnx", fixed=True), "u2net", tmp_path / "out")
    serving = network.serving_from_json(Manifest.read(folder, hint="").serving)
    texts = network.config_files(serving)
    assert set(texts) == {
        f"{contract.BACKGROUND}/{each}.pbtxt" for each in ("config", "configs/cpu", "configs/onnxruntime", "configs/rtx")
    }
    assert all("max_batch_size: 1\n" in text and "dims: 32\n" in text for text in texts.values())
    assert network.plan_sizes(serving) == {"B": (1, 1)}
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 32, 32]


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        ({"logits": True}, "u2net", "a model of the family u2net must end in a Sigmoid, got Identity\nhint: --model"),
        ({}, "birefnet", "a model of the family birefnet must end in anything but a Sigmoid, got Sigmoid\nhint: --model"),
        ({}, "rmbg", "model must be one of u2netp, u2net, isnet, birefnet, got 'rmbg'"),
    ],
)
def test_a_file_of_another_family_is_refused(model: dict[str, bool], family: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(BackgroundSource(path=write_model(tmp_path / "a.onnx", **model), family=family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_such_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for name, message in (("text.onnx", "must be an ONNX model, got: "), ("none.onnx", "found nothing at")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            BackgroundSource(path=tmp_path / name).serving()
    path = write_model(tmp_path / "a.onnx")
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 64
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="model must take a square picture, got 32 x 64"):
        BackgroundSource(path=path).serving()
    del model.graph.input[0].type.tensor_type.shape.dim[3]
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match=r"must take one picture \[batch, 3, side, side\], got input.1"):
        BackgroundSource(path=path).serving()


def test_the_file_has_one_precision(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match="precision must be fp32 for a network out of an ONNX file, got torch.float16"):
        BackgroundSource(path=write_model(tmp_path / "a.onnx")).load(torch.float16)


def test_another_file_is_another_artifact_and_no_proof(tmp_path: Path) -> None:
    folder = exported(write_model(tmp_path / "a.onnx"), "u2net", tmp_path / "out")
    manifest = Manifest.read(folder, hint="")
    other = BackgroundSource(path=write_model(tmp_path / "b.onnx", contrast=9.0), family="u2net")
    with pytest.raises(ManifestError, match="must be checked with its own file"):
        network.weights_of(manifest, other)
    exported(other.path, "u2net", tmp_path / "out")
    assert Manifest.read(folder, hint="").made_from["weights"] == other.identity() != manifest.made_from["weights"]
