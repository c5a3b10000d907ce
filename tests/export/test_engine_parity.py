"""Plans against torch and ONNX Runtime. Without a GPU, all code before the driver is tested, and the reason for skipping."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hunyuan3d_client import contract
from hunyuan3d_export import parity
from hunyuan3d_export.checks import within
from hunyuan3d_export.dit import network
from hunyuan3d_export.dit.network import CASES, TOLERANCES, compare_denoisers
from hunyuan3d_export.dit.reference_sampler import OnnxDenoiser
from hunyuan3d_export.engine_from_onnx import EngineOptions, build_engines, parse_profile
from hunyuan3d_export.engines import targets
from hunyuan3d_export.engines.gpu import Gpu, first_gpu
from hunyuan3d_export.engines.runtime import PlanLoadError, load_engine
from hunyuan3d_export.engines.targets import TargetMissing, find_target
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.parity import RECEIPT, narrowed, parse_at_most, verify_engines, why_skipped
from hunyuan3d_export.runners import OnnxRunner

without_gpu = pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU: plans are tried")


@pytest.fixture(scope="module")
def built(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build_engines(artifacts(precision="fp16"), out, find_target("tensorrt-rtx", ("SM89",)))
    return out


@pytest.fixture
def plans(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "plans"))


@without_gpu
def test_without_a_gpu_the_reason_is_one_line(plans: Path) -> None:
    assert why_skipped(plans) == "a plan runs on a GPU, and this machine has none"


def test_without_the_library_the_reason_names_it(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hunyuan3d_export.parity.first_gpu", lambda: Gpu("A GPU", "SM89"))
    assert why_skipped(plans) is None
    monkeypatch.setitem(targets._MODULES, "tensorrt-rtx", ("no_such_module",))
    assert why_skipped(plans) == "target tensorrt-rtx must have the package tensorrt-rtx, found none"


def test_damaged_plans_are_no_skip(plans: Path) -> None:
    (plans / contract.DIT / "model.rtx.plan").write_bytes(b"")
    with pytest.raises(ManifestError, match="must have sha256 .*\nhint: build them again with: hunyuan3d-export engine"):
        why_skipped(plans)


@pytest.mark.slow
@without_gpu
def test_the_library_says_why_a_plan_does_not_load(plans: Path) -> None:
    with pytest.raises(PlanLoadError, match="must load on this machine, got:\n  .*CUDA driver version is insufficient"):
        load_engine(plans / contract.DIT / "model.rtx.plan", find_target("tensorrt-rtx").library)


def test_stripped_plans_and_foreign_graphs_are_refused(plans: Path, artifacts: Callable[..., Path], micro: Any) -> None:
    with pytest.raises(PlanLoadError, match="must be compared with the ONNX artifact it was built from, got another\nhint: "):
        verify_engines(plans, micro, artifacts(precision="fp16", seed=1))
    for folder in plans.iterdir():
        manifest = Manifest.read(folder, hint="")
        made_from = {**manifest.made_from, "weight_stripped": True, "weights": None}
        dataclasses.replace(manifest, made_from=made_from).write(folder)
    with pytest.raises(PlanLoadError, match="got a weight-stripped one\nhint: hunyuan3d-export refit"):
        verify_engines(plans, micro)
    assert not list(plans.rglob(RECEIPT))


@given(st.data())
def test_checks_stay_within_the_profile(data: st.DataObject) -> None:
    profile = {}
    for axis, most in (("B", 8), ("L", 4096), ("T", 5480)):
        low = data.draw(st.integers(1, most))
        profile[axis] = [low, low, data.draw(st.integers(low, most))]
    for case in CASES:
        sizes = within(profile, case)
        for axis, size, wanted in zip("BLT", sizes, case, strict=True):
            assert profile[axis][0] <= size <= profile[axis][2]
            assert size == wanted or size in profile[axis]  # a size outside the profile moves to one of its values


def test_a_narrow_profile_is_compared_once_where_cases_meet(artifacts: Callable[..., Path], micro: Any) -> None:
    """The comparison itself, with ONNX Runtime instead of the engine and the torch model on the CPU."""
    onnx = artifacts(precision="fp16")
    manifest = Manifest.read(onnx / contract.DIT_GUIDED, hint="")
    profile = {"B": [1, 1, 1], "L": [16, 16, 16], "T": [1, 5, 9]}
    found = OnnxDenoiser(onnx)
    checks = list(compare_denoisers(manifest, found, micro.load(torch.float32), profile=profile, against=", torch"))
    assert [(check.name, check.sizes) for check in checks] == [
        ("evaluation, torch", (1, 16, 9)),
        ("evaluation, torch", (1, 16, 7)),
        ("50 steps, guided, torch", (1, 16, 9)),
    ]
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("most", [7.5, 1.0], ids=["right", "wrong above 1"])
def test_the_served_sizes_are_compared_at_the_served_scale(most: float, artifacts: Callable[..., Path], micro: Any) -> None:
    """A guided velocity has the errors of two velocities there, and a guidance that is wrong at that scale is still found."""
    folder = artifacts(precision="fp16")
    manifest, onnx = Manifest.read(folder / contract.DIT_GUIDED, hint=""), OnnxDenoiser(folder)

    def guided(latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, guidance_scale: torch.Tensor) -> torch.Tensor:
        return onnx.guided(latents, t, context, guidance_scale.clamp(max=most))

    profile = {"B": [1, 1, 1], "L": [16, 16, 16], "T": [1, 5, 9]}
    model, found = micro.load(torch.float32), SimpleNamespace(guided=guided)
    served, other = itertools.islice(compare_denoisers(manifest, found, model, profile=profile), 2)
    plain = TOLERANCES["fp16"].evaluation
    assert served.sizes == (1, 16, 9) and other.passed and other.tolerance == plain < served.tolerance < 10 * plain
    assert served.passed == (most > 1)


@pytest.fixture
def on_onnx(artifacts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The graphs in fp16, which stand in for the plans: ONNX Runtime runs them instead of a GPU, and torch runs on the CPU."""
    onnx, whole = artifacts(precision="fp16"), parity.TorchRunner
    monkeypatch.setattr(network, "_MOST_STEPS", 2)
    monkeypatch.setattr(parity, "PlanRunner", lambda _plans, _target: OnnxRunner(onnx))
    monkeypatch.setattr(parity, "TorchRunner", lambda model, graphs, **_: whole(model, graphs))
    return onnx


@pytest.mark.usefixtures("on_onnx")
def test_a_plan_is_compared_at_its_presets_sizes_too(plans: Path, micro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """v2-0's sizes here, whose attention a CPU computes in seconds when the network has two blocks."""
    shutil.rmtree(plans / contract.DIT_GUIDED)
    monkeypatch.setattr(network, "CASES", ())
    (checks,) = verify_engines(plans, micro).values()
    assert [(check.name, check.sizes) for check in checks][0] == ("evaluation, torch", (1, 3072, 1370))
    assert all(check.passed and check.relative_l2 > 0 for check in checks)


def test_a_slow_machine_compares_at_smaller_sizes(plans: Path, on_onnx: Path, micro: Any) -> None:
    results = verify_engines(plans, micro, on_onnx, at_most=parse_at_most(["latents=64", "context=50"]))
    for checks in results.values():
        own = [check.name for check in checks if check.sizes == (1, 64, 50)]
        assert own == ["evaluation, torch", "evaluation, ONNX Runtime"]
        assert all(check.sizes[1] <= 64 and check.sizes[2] <= 50 and check.passed for check in checks)


def test_a_bound_stays_within_the_profile() -> None:
    profile = {"B": [1, 2, 8], "L": [100, 512, 3072], "T": [1, 1370, 1370]}
    assert narrowed(profile, {}) == profile
    assert narrowed(profile, {"L": 600, "T": 20}) == {"B": [1, 2, 8], "L": [100, 512, 600], "T": [1, 20, 20]}
    assert narrowed(profile, {"L": 5})["L"] == [100, 100, 100], "the plan takes no less"


@pytest.mark.parametrize("text", ["latents", "latents=", "latents=0", "latents=-3", "width=3", "latents=1..2"])
def test_a_malformed_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--at-most must be one of {', '.join(contract.AXIS_NAMES.values())}, = and a size"):
        parse_at_most([text])


@pytest.mark.gpu
def test_plans_compute_what_the_weights_mean(artifacts: Callable[..., Path], micro: Any, tmp_path: Path) -> None:
    try:
        target = find_target("tensorrt")
    except TargetMissing as error:
        pytest.skip(str(error).splitlines()[0])
    for precision in ("fp16", "bf16"):
        onnx, plans = artifacts(precision=precision), tmp_path / precision
        build_engines(onnx, plans, target, EngineOptions(profile=parse_profile(["latents=1..64..256", "context=1..64..256"])))
        results = verify_engines(plans, micro, onnx)
        assert all(check.passed and check.relative_l2 > 0 for checks in results.values() for check in checks), results
        assert json.loads((plans / contract.DIT / RECEIPT).read_text())["versions"]["tensorrt"] == target.version
