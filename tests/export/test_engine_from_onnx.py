"""TensorRT for RTX compiles without a GPU, so every form of the graphs goes through the vendor's real compiler here."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hunyuan3d_client import contract
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.dit.sizes import plan_profile
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.engine_from_onnx import (
    BuildCancelled,
    BuildError,
    EngineOptions,
    build_engines,
    parse_profile,
)
from hunyuan3d_export.engines import targets
from hunyuan3d_export.engines.targets import Target, TargetMissing, find_target
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx

_TRT_DTYPES = {"FP32": "FLOAT", "FP16": "HALF"}


@pytest.fixture(scope="module")
def rtx() -> Target:
    return find_target("tensorrt-rtx")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("attention", "form"), [("op", "bias"), ("decomposed", "bias"), ("op", "repeat")])
def test_every_form_of_the_tiny_preset_compiles(
    rtx: Target, artifacts: Callable[..., Path], root: Path, precision: str, attention: str, form: str
) -> None:
    choices = "" if form == "bias" else f"guided_form={form}"
    onnx_folder = artifacts(Weights(preset="tiny"), precision=precision, attention=attention, choices=choices)
    out = root / "build" / "test" / f"tiny-{precision}-{attention}-{form}-rtx"
    folders = build_engines(onnx_folder, out, rtx)
    assert Manifest.read(out / contract.DIT_GUIDED, hint="").made_from["options"]["guided_form"] == form
    assert [folder.name for folder in folders] == [contract.DIT, contract.DIT_GUIDED]
    for folder in folders:
        manifest = Manifest.read(folder, hint="")
        assert manifest.made_from["compute_capabilities"] == ["SM89", "SM120"]
        assert (folder / "model.rtx.plan").stat().st_size > 1_000_000
        _assert_tensors_are_the_contracts(manifest)


def test_float32_parts_compile(rtx: Target, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    """In the repeat form. The compiler of TensorRT for RTX 1.7 refuses float32 attention with a bias."""
    choices = "guided_form=repeat,attention_accumulation=fp32,residual=fp32"
    folders = build_engines(artifacts(precision="fp16", choices=choices), tmp_path, rtx)
    options = [Manifest.read(folder, hint="").made_from["options"] for folder in folders]
    parts = {"attention_accumulation": "fp32", "residual": "fp32"}
    assert options == [parts, {**parts, "guided_form": "repeat"}]


def _assert_tensors_are_the_contracts(manifest: Manifest) -> None:
    spec = contract.denoiser(guided=manifest.model == contract.DIT_GUIDED)
    assert set(manifest.tensors) == {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    for tensor in (*spec.inputs, *spec.outputs):
        found = manifest.tensors[tensor.name]
        assert found["dtype"] == _TRT_DTYPES[tensor.dtype]
        assert found["shape"] == [-1 if isinstance(dim, str) else dim for dim in tensor.dims]
    for tensor in spec.inputs:
        wanted = [
            list(tensor.shape({axis: getattr(size, kind) for axis, size in plan_profile(PRESETS["tiny"]).items()}))
            for kind in ("min", "opt", "max")
        ]
        assert manifest.tensors[tensor.name]["profile"] == wanted


@pytest.fixture(scope="module")
def micro_fp16(artifacts: Any) -> Path:
    return Path(artifacts(precision="fp16"))


def test_the_graphs_are_not_replaced_by_their_plans(rtx: Target, micro_fp16: Path) -> None:
    with pytest.raises(ValueError, match="out must be another folder than what is read"):
        build_engines(micro_fp16, micro_fp16, rtx)
    assert (micro_fp16 / contract.DIT / "model.onnx").is_file()


@pytest.fixture(scope="module")
def micro_plans(rtx: Target, micro_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plans")
    build_engines(micro_fp16, out, rtx)
    return out


def test_unchanged_plans_are_kept_and_one_changed_weight_rebuilds(
    rtx: Target, micro_fp16: Path, micro_plans: Path, micro: Weights, tmp_path: Path
) -> None:
    plan = micro_plans / contract.DIT / "model.rtx.plan"
    before = (sha256(plan), plan.stat().st_mtime_ns)
    build_engines(micro_fp16, micro_plans, rtx)
    assert (sha256(plan), plan.stat().st_mtime_ns) == before
    other, changed = tmp_path / "onnx", load_file(str(micro.checkpoint))
    changed["model.final_layer.linear.bias"][0] += 0.5
    save_file(changed, tmp_path / "changed.safetensors")
    weights = Weights(checkpoint=tmp_path / "changed.safetensors")
    export_onnx(weights, other, graph="plain", options=OnnxOptions(precision="fp16"))
    build_engines(other, micro_plans, rtx)
    assert sha256(plan) != before[0]


def test_options_reach_the_plan(micro_fp16: Path, tmp_path: Path) -> None:
    only_plain = tmp_path / "onnx"
    only_plain.mkdir()
    (only_plain / contract.DIT).symlink_to(micro_fp16 / contract.DIT)
    one = find_target("tensorrt-rtx", ("SM86",))
    options = EngineOptions(profile=parse_profile(["latents=2..64..128", "batch=1..1..1"]), optimization_level=1)
    (folder,) = build_engines(only_plain, tmp_path / "out", one, options)
    manifest = Manifest.read(folder, hint="")
    assert manifest.tensors["latents"]["profile"] == [[1, 2, 64], [1, 64, 64], [1, 128, 64]]
    assert manifest.made_from["compute_capabilities"] == ["SM86"]
    assert manifest.made_from["optimization_level"] == 1


def test_broken_graph_is_a_readable_error_and_leaves_nothing(rtx: Target, micro_fp16: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx" / contract.DIT
    folder.mkdir(parents=True)
    model = onnx.load(micro_fp16 / contract.DIT / "model.onnx")
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.op_type = "Attntion"
    onnx.save(model, folder / "model.onnx")
    good = Manifest.read(micro_fp16 / contract.DIT, hint="")
    values = {**good.__dict__, "files": {"model.onnx": sha256(folder / "model.onnx")}}
    Manifest(**values).write(folder)
    with pytest.raises(BuildError, match="parse the graph") as caught:
        build_engines(tmp_path / "onnx", tmp_path / "out", rtx)
    assert "Attntion" in str(caught.value)
    assert "--attention decomposed" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_interrupt_cancels_the_build_and_leaves_nothing(rtx: Target, micro_fp16: Path, tmp_path: Path) -> None:
    def interrupt_once_building() -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.*partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        # Wait for the builder's handler: before it is in place, SIGINT raises Python's own KeyboardInterrupt.
        while signal.getsignal(signal.SIGINT) is original and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    original = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt_once_building)
    thread.start()
    with pytest.raises(BuildCancelled):
        build_engines(micro_fp16, tmp_path / "out", rtx)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is original
    assert not (tmp_path / "out").exists()


def test_without_rich_the_phases_are_lines_of_the_log(
    rtx: Target, micro_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The import of the bars now fails, as it does where rich is not installed.
    monkeypatch.setitem(sys.modules, "hunyuan3d_export.engines.terminal_bars", None)
    build_engines(micro_fp16, tmp_path / "out", rtx)
    assert any(f"{contract.DIT}: " in line and line.endswith(" steps") for line in caplog.messages), caplog.messages


def test_plans_need_whole_onnx_artifacts(rtx: Target, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="found none"):
        build_engines(tmp_path, tmp_path / "out", rtx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timing_cache": Path("cache")}, "timing cache must be left out"),
        ({"hardware_compatible": True}, "hardware_compatible must be False"),
    ],
)
def test_options_rtx_has_not_are_refused(rtx: Target, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_engines(tmp_path, tmp_path / "out", rtx, EngineOptions(**options))


def test_missing_library_names_both_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets._MODULES, "tensorrt", ("no_such_module",))
    with pytest.raises(TargetMissing, match="in the image that will serve the plan: docker compose --profile export") as caught:
        find_target("tensorrt")
    assert "make setup-gpu installs the same TensorRT into .venv" in str(caught.value)


def test_the_stubs_package_is_not_taken_for_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_stubs").mkdir()  # type stubs leave an empty folder, which Python can import
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(targets._MODULES, "tensorrt", ("only_stubs",))
    with pytest.raises(TargetMissing, match="found none"):
        find_target("tensorrt")


def test_the_standard_path_runs_with_the_rtx_library_in_its_place(
    monkeypatch: pytest.MonkeyPatch, micro_fp16: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(targets._MODULES, "tensorrt", targets._MODULES["tensorrt-rtx"])
    with pytest.raises(TargetMissing, match="found no GPU"):
        find_target("tensorrt")
    monkeypatch.setattr(targets, "first_gpu", lambda: targets.Gpu("A GPU", "SM89"))
    target = find_target("tensorrt")
    assert (target.compute_capabilities, target.gpu) == (("SM89",), targets.Gpu("A GPU", "SM89"))
    folders = build_engines(micro_fp16, tmp_path, target, EngineOptions(workspace_bytes=2**30, version_compatible=False))
    written = json.loads((folders[0] / "manifest.json").read_text())
    assert written["made_from"]["gpu"] == "A GPU"
    # The plan does not load without a driver, so its memory is estimated instead of measured.
    assert written["memory"]["activation_bytes"] > 0 and not written["memory"]["measured"]
    with pytest.raises(ValueError, match="this GPU's SM89"):
        find_target("tensorrt", ("SM120",))


def test_unknown_target_and_capability_are_refused() -> None:
    with pytest.raises(ValueError, match="target must be one of"):
        find_target("tensorflow")
    with pytest.raises(ValueError, match="compute capability must be one of"):
        find_target("tensorrt-rtx", ("SM90",))


@given(st.sampled_from(sorted(contract.AXIS_NAMES.values())), st.lists(st.integers(1, 5000), min_size=3, max_size=3))
def test_profile_is_taken_or_refused_never_bent(name: str, sizes: list[int]) -> None:
    text = f"{name}={sizes[0]}..{sizes[1]}..{sizes[2]}"
    axis = {word: axis for axis, word in contract.AXIS_NAMES.items()}[name]
    if sizes == sorted(sizes) and sizes[2] <= contract.AXES[axis].max:
        assert parse_profile([text])[axis] == contract.AxisRange(*sizes)
    else:
        with pytest.raises(ValueError, match="must"):
            parse_profile([text])


@pytest.mark.parametrize("text", ["latents", "latents=1..2", "latents=a..b..c", "width=1..2..3", "=1..2..3"])
def test_malformed_profiles_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        parse_profile([text])


@pytest.mark.parametrize("options", [{"optimization_level": 6}, {"workspace_bytes": 0}, {"profile": {}}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        EngineOptions(**options)
