"""Which plans may be deployed and served on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import repository_from_artifacts
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.engines.gpu import Gpu
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.repository_from_artifacts import DeployError, check_plan, deploy

HINT = "hint: on the machine that will serve: hunyuan3d-export engine --target tensorrt --onnx DIR --out DIR"


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT 11.1.0.1 and an SM89 GPU."""
    monkeypatch.setattr(repository_from_artifacts, "installed_version", lambda _name: "11.1.0.1")
    monkeypatch.setattr(repository_from_artifacts, "first_gpu", lambda: Gpu("An Ada", "SM89"))


def plan(**changes: Any) -> Manifest:
    made_from = {
        "target": "tensorrt",
        "library_version": "11.1.0.1",
        "compute_capabilities": ["SM89"],
        "version_compatible": False,
        "hardware_compatible": False,
        "weight_stripped": False,
    }
    return Manifest(
        model=contract.DIT, made_from={**made_from, **changes}, serving={}, versions={}, files={"model.plan": "0" * 64}
    )


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"library_version": "10.15", "version_compatible": True},
        {"compute_capabilities": ["SM80"], "hardware_compatible": True},
    ],
    ids=str,
)
def test_plans_of_this_machine_pass(changes: dict[str, Any]) -> None:
    check_plan(plan(**changes), Path("plans"))


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "tensorrt-rtx"}, "must hold a plan of target tensorrt, which Triton's backend loads, got tensorrt-rtx"),
        ({"library_version": "11.3.0.2"}, "must be built by this machine's TensorRT 11.1.0.1, got 11.3.0.2"),
        ({"compute_capabilities": ["SM90"]}, r"must be built for this machine's SM89 \(An Ada\), got SM90"),
    ],
    ids=["target", "library", "GPU"],
)
def test_other_plans_are_refused_with_the_command_that_makes_the_right_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeployError, match=f"plans {message}\n{HINT}"):
        check_plan(plan(**changes), Path("plans"))


@pytest.mark.usefixtures("ada")
def test_a_stripped_plan_is_refused_with_the_refit() -> None:
    with pytest.raises(DeployError, match="got a weight-stripped one\nhint: hunyuan3d-export refit --plan DIR --onnx DIR"):
        check_plan(plan(weight_stripped=True), Path("plans"))


def test_where_nothing_can_be_asked_a_plan_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository_from_artifacts, "installed_version", lambda _name: None)
    monkeypatch.setattr(repository_from_artifacts, "first_gpu", lambda: None)
    check_plan(plan(library_version="1.0", compute_capabilities=["SM75"]), Path("plans"))


FITTING = {"B": [1, 2, 8], "L": [1, 3072, 3072], "T": [1, 1370, 1370]}


def place(folder: Path, profile: dict[str, list[int]]) -> Path:
    """An artifact folder whose plan is an empty file and whose manifest has this profile."""
    preset = dataclasses.asdict(PRESETS["v2-0"])
    made_from = {**plan(profile=profile).made_from, "weights": {"preset": "v2-0", "seed": 0}}
    (folder / contract.DIT).mkdir(parents=True)
    (folder / contract.DIT / "model.plan").write_bytes(b"")
    files = {"model.plan": sha256(folder / contract.DIT / "model.plan")}
    Manifest(model=contract.DIT, made_from=made_from, serving=preset, versions={}, files=files).write(folder / contract.DIT)
    return folder


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    ("axis", "sizes", "message"),
    [
        ("B", [1, 2, 4], "B from 1 to 8, as the sampler will ask, got 1 to 4"),
        ("B", [2, 2, 8], "B from 1 to 8, as the sampler will ask, got 2 to 8"),
        ("L", [1, 512, 1024], "L from 3072 to 3072, as the sampler will ask, got 1 to 1024"),
        ("T", [1371, 2000, 5480], "T from 1370 to 1370, as the sampler will ask, got 1371 to 5480"),
    ],
)
def test_a_plan_too_narrow_for_its_configs_is_refused(axis: str, sizes: list[int], message: str, tmp_path: Path) -> None:
    deploy(place(tmp_path / "fitting", FITTING), tmp_path / "repository")
    with pytest.raises(DeployError, match=message):
        deploy(place(tmp_path / "narrow", {**FITTING, axis: sizes}), tmp_path / "repository")
    assert (tmp_path / "repository" / contract.DIT / "1" / "model.plan").is_file(), "the one before stays"
