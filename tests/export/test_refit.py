"""Weight-stripped plans: their manifests, their deployment and refit, and the library's refusals without a GPU."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export.engine_from_onnx import BuildError, EngineOptions, _made_from, _write_manifest, build_engines
from hunyuan3d_export.engines.gpu import first_gpu
from hunyuan3d_export.engines.plan_check import DeployError, check_plan
from hunyuan3d_export.engines.refit import RefitError, refit_plans
from hunyuan3d_export.engines.runtime import PlanLoadError
from hunyuan3d_export.engines.structure import structure_digest
from hunyuan3d_export.engines.targets import Target, TargetMissing, find_target
from hunyuan3d_export.manifest import Manifest, file_digests
from hunyuan3d_export.parity import verify_engines
from hunyuan3d_export.repository_from_artifacts import deploy

STRIPPED = EngineOptions(weight_stripped=True)
without_gpu = pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU: the library does not refuse")


@pytest.fixture(scope="module")
def rtx() -> Target:
    return find_target("tensorrt-rtx")


@pytest.fixture(scope="module")
def whole(rtx: Target, artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    build_engines(artifacts(precision="fp16"), out, rtx)
    return out


@pytest.fixture
def stripped(rtx: Target, artifacts: Callable[..., Path], whole: Path, tmp_path: Path) -> Path:
    """Folders like those of `engine --weight-stripped` on a GPU machine, except that the plans still hold their weights."""
    out = tmp_path / "stripped"
    for model in (contract.DIT, contract.DIT_GUIDED):
        folder, source = out / model, artifacts(precision="fp16") / model
        folder.mkdir(parents=True)
        shutil.copyfile(whole / model / rtx.plan_file, folder / rtx.plan_file)
        manifest = Manifest.read(source, hint="")
        made_from = _made_from(source, manifest, rtx, options=STRIPPED, axes=contract.denoiser().axes)
        _write_manifest(folder, manifest, made_from, rtx, {})
    return out


def test_structure_is_the_networks_and_not_the_weights(artifacts: Callable[..., Path]) -> None:
    def digest(model: str = contract.DIT, **options: Any) -> str:
        return structure_digest(artifacts(**{"precision": "fp16", **options}) / model / "model.onnx")

    assert digest() == digest(seed=1)
    assert digest(contract.DIT_GUIDED) == digest(contract.DIT_GUIDED, seed=1)
    others = (digest(), digest(contract.DIT_GUIDED), digest(precision="fp32"), digest(attention="decomposed"))
    assert len({*others, digest(distilled=True)}) == 5


def test_a_stripped_plan_is_nobodys(rtx: Target, artifacts: Callable[..., Path]) -> None:
    folders = [artifacts(precision="fp16", seed=seed) / contract.DIT for seed in (0, 1)]
    manifests = [Manifest.read(folder, hint="") for folder in folders]
    both = [
        _made_from(folder, manifest, rtx, options=STRIPPED, axes=contract.denoiser().axes)
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    assert both[0] == both[1]  # equal, so a plan built from one seed is kept for the other
    assert (both[0]["weights"], both[0]["onnx"], both[0]["weight_stripped"]) == (None, None, True)
    whole = _made_from(folders[0], manifests[0], rtx, options=EngineOptions(), axes=contract.denoiser().axes)
    assert (whole["weights"], whole["weight_stripped"]) == (manifests[0].made_from["weights"], False)


@without_gpu
def test_without_a_gpu_the_library_refuses_to_strip(rtx: Target, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    """With REFIT, TensorRT's compiler Myelin needs a GPU. The error must be as readable at the second build as at the first."""
    for _ in range(2):
        with pytest.raises(BuildError, match="must build the graph, got:\n  .*Myelin") as caught:
            build_engines(artifacts(precision="fp16"), tmp_path / "out", rtx, STRIPPED)
        assert "hint: a plan whose weights can be exchanged compiles only on a GPU" in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_stripped_plan_is_not_deployed(stripped: Path, tmp_path: Path) -> None:
    folder = stripped / contract.DIT
    manifest = Manifest.read(folder, hint="")
    with pytest.raises(DeployError, match="must hold a plan with weights.*\nhint: hunyuan3d-export refit --plan DIR"):
        check_plan(manifest, folder)
    with pytest.raises(DeployError, match="weight-stripped"):
        deploy(stripped, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@without_gpu
def test_without_a_gpu_a_plan_does_not_load(stripped: Path, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanLoadError, match="must load on this machine, got:\n  .*[Cc]uda.*(\n.*)*hint: it needs the GPU"):
        refit_plans(stripped, artifacts(precision="fp16", seed=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refit_that_is_there_is_kept(rtx: Target, stripped: Path, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    from hunyuan3d_export.engines.refit import _made_from as refitted_from
    from hunyuan3d_export.engines.refit import _write_manifest as write

    onnx, out = artifacts(precision="fp16", seed=1), tmp_path / "out"
    for each in stripped.iterdir():
        plan, weights = Manifest.read(each, hint=""), Manifest.read(onnx / each.name, hint="")
        (out / each.name).mkdir(parents=True)
        (out / each.name / rtx.plan_file).write_bytes(b"a plan")
        write(out / each.name, plan, weights, refitted_from(plan, weights), rtx)
    assert refit_plans(stripped, onnx, out) == [out / contract.DIT, out / contract.DIT_GUIDED]
    found = Manifest.read(out / contract.DIT, hint="").made_from
    assert found["weights"] == Manifest.read(onnx / contract.DIT, hint="").made_from["weights"]
    assert found["weight_stripped"] is False and found["refitted_from"] == file_digests(stripped / contract.DIT)


def test_other_networks_are_refused(stripped: Path, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options in ({"precision": "fp32"}, {"precision": "fp16", "attention": "decomposed"}):
        with pytest.raises(RefitError, match="must be the network that .* was built from.*\nhint: build a plan of its own"):
            refit_plans(stripped, artifacts(**options), out)
    with pytest.raises(RefitError, match="must be the network|must be given for hunyuan3d_dit_guided"):
        refit_plans(stripped, artifacts(precision="fp16", distilled=True), out)
    assert not out.exists()


def test_plans_that_cannot_take_weights_are_refused(stripped: Path, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    folder = stripped / contract.DIT
    manifest = Manifest.read(folder, hint="")

    def with_made_from(**changes: object) -> None:
        dataclasses.replace(manifest, made_from={**manifest.made_from, **changes}).write(folder)

    def refit() -> list[Path]:
        return refit_plans(stripped, artifacts(precision="fp16"), tmp_path / "out")

    with_made_from(weight_stripped=False)
    with pytest.raises(RefitError, match="must hold a weight-stripped plan, got none\nhint: hunyuan3d-export engine"):
        refit()
    with_made_from(library_version="1.0")
    with pytest.raises(RefitError, match="must be refitted by tensorrt-rtx 1.0, which built it, got"):
        refit()
    if first_gpu() is None:
        with_made_from(target="tensorrt")
        with pytest.raises(TargetMissing, match="found no"):
            refit()
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_base_and_other_weights_swap_without_a_build(
    artifacts: Callable[..., Path], micro_weights: Callable[..., Any], tmp_path: Path
) -> None:
    try:
        target = find_target("tensorrt")
    except TargetMissing as error:
        pytest.skip(str(error).splitlines()[0])
    onnx = artifacts(precision="fp16")
    build_engines(onnx, tmp_path / "stripped", target, STRIPPED)
    build_engines(onnx, tmp_path / "whole", target)
    for seed in (0, 1):
        folders = refit_plans(tmp_path / "stripped", artifacts(precision="fp16", seed=seed), tmp_path / f"{seed}")
        whole = tmp_path / "whole" / contract.DIT / "model.plan"
        assert (tmp_path / "stripped" / contract.DIT / "model.plan").stat().st_size < whole.stat().st_size / 2
        assert folders[0].joinpath("model.plan").stat().st_size > 0.8 * whole.stat().st_size
        found = verify_engines(tmp_path / f"{seed}", micro_weights(seed=seed))
        assert all(check.passed for checks in found.values() for check in checks)
