"""Which plans may be deployed and served on this machine."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.engines import plan_check
from hunyuan3d_export.engines.gpu import Gpu
from hunyuan3d_export.engines.plan_check import DeployError, check_plan
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.networks import NETWORKS
from hunyuan3d_export.repository_from_artifacts import SOURCE, deploy

HINT = "hint: on the machine that will serve: docker compose --profile export run --rm export engine --checkpoint FILE"


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an SM89 GPU, where the server's image has TensorRT 11.1.0."""
    monkeypatch.setenv("TENSORRT_VERSION", "11.1.0")
    monkeypatch.setattr(plan_check, "installed_version", lambda _name: "11.1.0.1")
    monkeypatch.setattr(plan_check, "first_gpu", lambda: Gpu("An Ada", "SM89"))


def plan(**changes: Any) -> Manifest:
    made_from = {
        "target": "tensorrt",
        "precision": "fp16",
        "library_version": "11.1.0.1",
        "compute_capabilities": ["SM89"],
        "version_compatible": False,
        "hardware_compatible": False,
        "weight_stripped": False,
    }
    return Manifest(
        model=contract.DIT, made_from={**made_from, **changes}, serving={}, versions={}, files={"model.plan": "0" * 64}
    )


def rtx_plan(**changes: Any) -> Manifest:
    wanted = {"target": "tensorrt-rtx", "compute_capabilities": ["SM86", "SM89"], **changes}
    return dataclasses.replace(plan(**wanted), files={"model.rtx.plan": "0" * 64})


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"library_version": "11.0.0.114", "version_compatible": True},
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
        ({"library_version": "11.3.0.2"}, "must be built by the server image's TensorRT 11.1.0, got 11.3.0.2"),
        ({"compute_capabilities": ["SM90"]}, r"must be built for this machine's SM89 \(An Ada\), got SM90"),
    ],
    ids=["library", "GPU"],
)
def test_other_plans_are_refused_with_the_command_that_makes_the_right_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeployError, match=f"plans {message}\n{HINT}"):
        check_plan(plan(**changes), Path("plans"))


@pytest.mark.usefixtures("ada")
def test_a_plan_for_rtx_passes_under_its_own_name() -> None:
    check_plan(rtx_plan(), Path("plans"))


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    ("found", "message"),
    [
        (rtx_plan(library_version="1.7", version_compatible=True), "built by this machine's tensorrt-rtx 11.1.0.1, got 1.7"),
        (rtx_plan(compute_capabilities=["SM120"]), r"built for this machine's SM89 \(An Ada\), got SM120"),
        (plan(target="tensorrt-rtx"), "must hold its plan of target tensorrt-rtx as model.rtx.plan, got model.plan"),
        (rtx_plan(target="tensorrt"), "must hold its plan of target tensorrt as model.plan, got model.rtx.plan"),
    ],
    ids=["library", "GPU", "for Triton's backend", "for the Python backend"],
)
def test_other_plans_for_rtx_are_refused(found: Manifest, message: str) -> None:
    target = found.made_from["target"]
    commands = {
        "tensorrt-rtx": "hunyuan3d-export engine --target tensorrt-rtx --onnx DIR",
        "tensorrt": "docker compose --profile export",
    }
    with pytest.raises(DeployError, match=f"{message}\nhint: .*{commands[target]}"):
        check_plan(found, Path("plans"))


@pytest.mark.usefixtures("ada")
def test_a_stripped_plan_is_refused_with_the_refit() -> None:
    with pytest.raises(DeployError, match="got a weight-stripped one\nhint: hunyuan3d-export refit --plan DIR --onnx DIR"):
        check_plan(plan(weight_stripped=True), Path("plans"))


def test_without_a_gpu_only_the_gpu_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "first_gpu", lambda: None)
    check_plan(plan(library_version=f"{versions_env()}.1", compute_capabilities=["SM75"]), Path("plans"))
    with pytest.raises(DeployError, match=f"must be built by the server image's TensorRT {versions_env()}, got 1.0"):
        check_plan(plan(library_version="1.0", compute_capabilities=["SM75"]), Path("plans"))


def test_the_library_of_this_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that the local TensorRT made and can load is still refused, because the image serves it."""
    monkeypatch.setattr(plan_check, "first_gpu", lambda: None)
    library = types.ModuleType("tensorrt")
    library.__version__, library.Builder = "11.4.0.106", object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    with pytest.raises(DeployError, match="must be built by the server image's TensorRT .*, got 11.4.0.106"):
        check_plan(plan(library_version="11.4.0.106"), Path("plans"))


def versions_env() -> str:
    text = (Path(__file__).parents[2] / "docker" / "versions.env").read_text()
    return next(line.partition("=")[2] for line in text.splitlines() if line.startswith("TENSORRT_VERSION="))


FITTING = {"B": [1, 2, 8], "L": [1, 3072, 3072], "T": [1, 1370, 1370]}


def place(folder: Path, profile: dict[str, list[int]], preset: str = "v2-0") -> Path:
    """An artifact folder whose plan is an empty file and whose manifest has this profile."""
    serving = dataclasses.asdict(PRESETS[preset])
    made_from = {**plan(profile=profile).made_from, "weights": {"preset": preset, "seed": 0}}
    (folder / contract.DIT).mkdir(parents=True)
    (folder / contract.DIT / "model.plan").write_bytes(b"")
    files = {"model.plan": sha256(folder / contract.DIT / "model.plan")}
    Manifest(model=contract.DIT, made_from=made_from, serving=serving, versions={}, files=files).write(folder / contract.DIT)
    return folder


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    ("axis", "sizes", "message"),
    [
        ("B", [1, 2, 4], "B from 1 to 8, as its callers will ask, got 1 to 4"),
        ("B", [2, 2, 8], "B from 1 to 8, as its callers will ask, got 2 to 8"),
        ("L", [1, 512, 1024], "L from 3072 to 3072, as its callers will ask, got 1 to 1024"),
        ("T", [1371, 2000, 5480], "T from 1370 to 1370, as its callers will ask, got 1371 to 5480"),
    ],
)
def test_a_plan_too_narrow_for_its_configs_is_refused(axis: str, sizes: list[int], message: str, tmp_path: Path) -> None:
    deploy(place(tmp_path / "fitting", FITTING), tmp_path / "repository")
    with pytest.raises(DeployError, match=message):
        deploy(place(tmp_path / "narrow", {**FITTING, axis: sizes}), tmp_path / "repository")
    assert (tmp_path / "repository" / contract.DIT / "1" / "model.plan").is_file(), "the one before stays"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout beside this code's own one, as it is mounted into the export image."""
    skip = shutil.ignore_patterns("model.*on*", "model.plan", "*.json", "__pycache__")
    shutil.copytree(SOURCE, tmp_path / "work" / "model_repository", ignore=skip, symlinks=True)
    (tmp_path / "work" / "docker").mkdir()
    (tmp_path / "work" / "docker" / "versions.env").write_text("")
    return tmp_path / "work" / "model_repository"


@pytest.mark.usefixtures("ada")
def test_the_export_image_treats_a_mounted_checkout_as_one(checkout: Path, tmp_path: Path) -> None:
    """Deploying there changes no tracked file: neither configs nor the links between the folders of the models."""
    tracked = {path: path.readlink() if path.is_symlink() else path.read_bytes() for path in checkout.rglob("*.p*")}
    deploy(place(tmp_path / "plans", FITTING), checkout)
    assert (checkout / contract.DIT / "1" / "model.plan").is_file()
    found = {path: path.readlink() if path.is_symlink() else path.read_bytes() for path in tracked}
    assert found == tracked
    with pytest.raises(DeployError, match="must keep its configs, and v2-mv needs others"):
        deploy(place(tmp_path / "views", {"B": [1, 2, 4], "L": [1, 3072, 3404], "T": [1, 5480, 5480]}, "v2-mv"), checkout)


@pytest.mark.usefixtures("ada")
def test_in_git_a_plan_must_take_the_warm_up_of_the_configs_there(checkout: Path, tmp_path: Path) -> None:
    """The mini preset has the base configs but for its warm-up, so a plan that takes both sizes may go there."""
    own = {"B": [1, 2, 8], "L": [1, 512, 512], "T": [1, 1370, 1370]}
    with pytest.raises(DeployError, match="L from 3072 to 3072, as its callers will ask, got 1 to 512"):
        deploy(place(tmp_path / "narrow", own, "v2-mini"), checkout)
    deploy(place(tmp_path / "wide", {**own, "L": [1, 512, 3072]}, "v2-mini"), checkout)
    deploy(tmp_path / "narrow", tmp_path / "copy")
    text = (tmp_path / "copy" / contract.DIT / "config.pbtxt").read_text()
    assert "dims: 512\n" in text and "dims: 3072\n" not in text


@pytest.mark.usefixtures("ada")
def test_a_plan_that_no_config_serves_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_others = {f"{contract.DIT}/config.pbtxt": 'default_model_filename: "model.onnx"', "other/config.pbtxt": '"model.plan"'}
    network = dataclasses.replace(NETWORKS["dit"], configs=lambda _serving: only_others)
    monkeypatch.setitem(NETWORKS, "dit", network)
    message = f"must hold a plan that a config of {contract.DIT} serves, got one of target tensorrt\nhint: "
    with pytest.raises(DeployError, match=message):
        deploy(place(tmp_path / "plans", FITTING), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
