"""The rows of the mesh stage: every runtime against float32 torch, with the graphs as a packed file brings them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hunyuan3d_client import contract
from hunyuan3d_export.files import ONNX_FILE
from hunyuan3d_export.gpu_check import graphs, mesh_rows
from hunyuan3d_export.gpu_check.graphs import Contents
from hunyuan3d_export.gpu_check.mesh_rows import CASES, PART, Case, MeshRows
from hunyuan3d_export.gpu_check.onnxruntime_runner import BoundRunner
from hunyuan3d_export.gpu_check.rows import Row
from hunyuan3d_export.gpu_check.runtimes import ONNX_RUNTIME, TENSORRT, TORCH
from hunyuan3d_export.gpu_check.setting import Setting
from hunyuan3d_export.runners import TorchRunner
from hunyuan3d_export.shapevae import PRESETS
from hunyuan3d_export.shapevae.network import example_inputs, in_precision

SHORT = ("keys and values, B 1", "field, P 4096, B 1", "field, P 4096, B 8")
MODELS = [contract.VAE, contract.FIELD]


@pytest.fixture(scope="session")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the packed graphs of the tiny decoder, in both precisions. The exports are kept between runs."""
    folder = tmp_path_factory.mktemp("graphs")
    for precision in ("fp32", "fp16"):
        contents = Contents("tiny", precision, network="vae")
        exported = contents.export(root / "build" / "test" / f"gpu-check-vae-{precision}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Contents, "export", lambda _self, _folder, exported=exported: exported)
            graphs.pack(contents, folder)
    return folder


@pytest.fixture
def setting(tmp_path: Path, packed: Path) -> Setting:
    places = {"build": tmp_path / "build", "graphs": packed, "work": tmp_path}
    return Setting(device=torch.device("cpu"), presets=("tiny",), steps=2, attention_length=8, row_s=0.0, **places)


def rows_of(setting: Setting, runtime: str) -> list[Row]:
    return [job.measured() for job in MeshRows(setting).jobs("tiny") if job.name.endswith(f", {runtime} fp32")]


def test_every_runtime_has_the_same_rows(setting: Setting) -> None:
    jobs = list(MeshRows(setting).jobs("tiny"))
    assert [job.name for job in jobs] == [
        f"tiny {case}, {runtime} fp32" for runtime in (TORCH, TENSORRT, ONNX_RUNTIME) for case in SHORT
    ]
    assert {job.part for job in jobs} == {PART}


@pytest.mark.parametrize("runtime", [TORCH, ONNX_RUNTIME])
def test_measured_rows(setting: Setting, runtime: str) -> None:
    rows = rows_of(setting, runtime)
    for row, case in zip(rows, CASES, strict=True):
        assert row.passed and row.time_ms and row.roofline_ms, row
        assert row.error is not None and row.error < 1e-5 == row.tolerance
        assert row.tflop == case.flop(PRESETS["tiny"]) / 1e12 and row.memory_mib is None
    assert rows[2].tflop == pytest.approx(8 * (rows[1].tflop or 0))
    assert (setting.work / "tiny-fp32-vae" / contract.FIELD / ONNX_FILE).is_file() == (runtime == ONNX_RUNTIME)


def test_plans_need_a_gpu(setting: Setting) -> None:
    assert {row.note for row in rows_of(setting, TENSORRT)} == {"skipped: TensorRT runs on a GPU, and this run is on cpu"}
    assert not (setting.work / "tiny-fp32-vae").exists()


def test_a_wrong_field_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = MeshRows._loaded

    def half_weights(self: MeshRows, runtime: str, preset: object) -> object:
        runner = loaded(self, runtime, preset)  # type: ignore[arg-type]
        run = runner.run
        runner.run = lambda model, tensors: {name: 1.001 * value for name, value in run(model, tensors).items()}  # type: ignore[method-assign]
        return runner

    monkeypatch.setattr(MeshRows, "_loaded", half_weights)
    assert [row.passed for row in rows_of(setting, TORCH)] == [False] * 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_packed_graphs_give_the_field_of_torch(packed: Path, tmp_path: Path, precision: str) -> None:
    contents = Contents("tiny", precision, network="vae")
    path = packed / f"{contents.name}.zip"
    assert path.stat().st_size < 60_000
    preset = in_precision(PRESETS["tiny"], precision)
    artifacts = graphs.unpack(path, contents, tmp_path / "out")
    found = BoundRunner(artifacts, torch.device("cpu"))
    expected = TorchRunner(contents.source.load(torch.float32), mesh_rows.graphs(in_precision(preset, "fp32")))
    for model in MODELS:
        inputs = example_inputs(preset, model, (2, 33, 70))
        outputs, wanted = found.run(model, inputs), expected.run(model, inputs)
        assert outputs.keys() == wanted.keys()
        for name, value in outputs.items():
            assert value.shape == wanted[name].shape
            torch.testing.assert_close(
                value.float(),
                wanted[name],
                **{"fp32": {"rtol": 1e-4, "atol": 1e-5}, "fp16": {"rtol": 0.05, "atol": 0.02}}[precision],
            )


def test_cases_differ_in_every_sample() -> None:
    field = Case(contract.FIELD, 8).inputs(PRESETS["tiny"])
    assert field["queries"].shape == (8, 4096, 3) and field["k"].dtype == torch.float16
    assert len({float(value.sum()) for value in field["queries"]}) == 8
