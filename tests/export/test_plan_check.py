"""Which plans may be deployed and served on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import repository_from_artifacts
from hunyuan3d_export.gpu import Gpu
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.repository_from_artifacts import DeployError, check_plan

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
