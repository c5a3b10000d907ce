"""The encoder's artifact: parity, reuse, TensorRT for RTX, and the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import parity
from hunyuan3d_export.commands import app
from hunyuan3d_export.dit import network
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.engine_from_onnx import build_engines
from hunyuan3d_export.engines.targets import find_target
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.runners import OnnxRunner

Export = Callable[..., Path]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "views", "tolerance"), [("fp32", 1, 1e-4), ("fp32", 4, 1e-4), ("fp16", 1, 5e-3)], ids=str
)
def test_onnx_runtime_computes_what_torch_computes(exported: Export, precision: str, views: int, tolerance: float) -> None:
    (checks,) = parity.verify(exported(precision=precision, views=views)).values()
    assert len(checks) == (2 if views > 1 else 1)
    for check in checks:
        assert 0 < check.relative_l2 <= tolerance == check.tolerance, check


def test_1022_pixels(exported: Export) -> None:
    (checks,) = parity.verify(exported(image_size=1022)).values()
    assert checks[0].sizes == (2, 0, 5330) and checks[0].passed


def test_the_graph(exported: Export) -> None:
    folder = exported(views=4) / contract.CONDITIONER
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [tensor.name for tensor in (*graph.input, *graph.output)] == ["pixels", "context"]
    dims = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["B", "V", 3, 518, 518]
    operators = {node.op_type for node in graph.node}
    assert {"Attention", "LayerNormalization"} <= operators and "Resize" not in operators
    decomposed = onnx.load(exported(attention="decomposed") / contract.CONDITIONER / "model.onnx", load_external_data=False)
    assert "Attention" not in {node.op_type for node in decomposed.graph.node}
    manifest = Manifest.read(folder, hint="")
    assert manifest.serving == {"image_size": 518, "views": 4}


def test_an_unchanged_artifact_is_kept(exported: Export) -> None:
    before = (exported() / contract.CONDITIONER / "model.onnx").stat().st_mtime_ns
    assert (exported() / contract.CONDITIONER / "model.onnx").stat().st_mtime_ns == before


def test_tensorrt_for_rtx_compiles_it_in_fp16(exported: Export, tmp_path: Path) -> None:
    for views in (1, 4):
        onnx_folder = exported(precision="fp16", views=views)
        (folder,) = build_engines(onnx_folder, tmp_path / str(views), find_target("tensorrt-rtx", ("SM89", "SM120")))
        tensors = Manifest.read(folder, hint="").tensors
        assert (folder / "model.rtx.plan").stat().st_size > 20e6
        assert tensors["pixels"]["profile"] == [[1, 1, 3, 518, 518], [2, 1, 3, 518, 518], [8, views, 3, 518, 518]]
        assert (tensors["pixels"]["dtype"], tensors["context"]["dtype"]) == ("FLOAT", "HALF")


def test_verify_wants_the_weights_of_a_checkpoint(tmp_path: Path, micro: Weights) -> None:
    from safetensors.torch import save_file

    from hunyuan3d_export.conditioner import random_conditioner
    from hunyuan3d_export.conditioner.weights import ConditionerSource
    from hunyuan3d_export.onnx_from_torch import export_onnx

    save_file(random_conditioner("tiny", seed=5).dinov2.state_dict(), tmp_path / "model.safetensors")
    export_onnx(ConditionerSource(path=tmp_path / "model.safetensors"), tmp_path / "out")
    with pytest.raises(ManifestError, match="must be checked with its own weights, .*\nhint: --checkpoint FILE"):
        parity.verify(tmp_path / "out", micro)
    (checks,) = parity.verify(tmp_path / "out", Weights(checkpoint=tmp_path / "model.safetensors")).values()
    assert checks[0].passed


def test_a_folder_with_both_networks_plans_is_compared_whole(
    artifacts: Export, exported: Export, micro: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`verify --engine` on a folder with a denoiser's and an encoder's plan, with ONNX Runtime in the place of the GPU."""
    onnx_folder = tmp_path / "onnx"
    for source, model in ((artifacts, contract.DIT), (exported, contract.CONDITIONER)):
        shutil.copytree(source(precision="fp16") / model, onnx_folder / model)
    build_engines(onnx_folder, tmp_path / "plans", find_target("tensorrt-rtx", ("SM89",)))
    whole = parity.TorchRunner
    monkeypatch.setattr(parity, "PlanRunner", lambda _plans, _target: OnnxRunner(onnx_folder))
    monkeypatch.setattr(parity, "TorchRunner", lambda network, graphs, **_: whole(network, graphs))
    monkeypatch.setattr(network, "_MOST_STEPS", 4)
    results = parity.verify_engines(tmp_path / "plans", micro, onnx_folder)
    assert [check.name for check in results[contract.CONDITIONER]] == ["1 x 518 px, torch", "1 x 518 px, ONNX Runtime"]
    assert [check.name for check in results[contract.DIT]][-1] == "4 steps, two-batch, ONNX Runtime"
    assert all(check.passed for checks in results.values() for check in checks)
    assert all(checks[0].relative_l2 > 0 for checks in results.values())
    assert all((tmp_path / "plans" / model / parity.RECEIPT).is_file() for model in results)


def test_a_damaged_encoder_is_told_its_own_command(exported: Export, tmp_path: Path) -> None:
    shutil.copytree(exported(), tmp_path / "artifacts")
    (tmp_path / "artifacts" / contract.CONDITIONER / "model.onnx").write_bytes(b"")
    with pytest.raises(ManifestError, match="must have sha256 .*\nhint: export again with: hunyuan3d-export conditioner"):
        parity.verify(tmp_path / "artifacts")
    with pytest.raises(ManifestError, match="\nhint: make them again with: hunyuan3d-export conditioner --out"):
        deploy(tmp_path / "artifacts", tmp_path / "repository")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["hunyuan3d-export", "conditioner", "--out", str(tmp_path), "--views", "4"])
    with pytest.raises(SystemExit) as ended:
        app.run()
    assert ended.value.code in (0, None) and str(tmp_path / contract.CONDITIONER) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["hunyuan3d-export", "conditioner", "--out", str(tmp_path), "--checkpoint", "nothing"])
    assert app.run() == 2
    assert "conditioner must be a checkpoint or a folder" in capsys.readouterr().err
