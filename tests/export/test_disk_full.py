"""A full disk is told with the path, and neither it nor Ctrl-C leaves a half repository or an empty folder."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan3d_client import contract
from hunyuan3d_client.files import DiskFull, atomic_path
from hunyuan3d_export import onnx_from_torch, repository_from_artifacts
from hunyuan3d_export.dit.checkpoint import save_checkpoint
from hunyuan3d_export.files import atomic_folder
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy, deploy_checkpoint
from hunyuan3d_export.server.embedded import loadable_models

_DISK_BYTES = 600_000
TOLD = "found no space left on device\nhint: "


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """The folder of a real file system that is smaller than the weights of these tests."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root; the tests with a stub cover the same code")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "another name")


def test_export_names_the_folder_that_did_not_fit(micro: Any, small: Path) -> None:
    with pytest.raises(DiskFull, match=f"{small / 'out' / contract.DIT} must fit on its disk, {TOLD}"):
        export_onnx(micro, small / "out", graph="plain")
    assert not list(small.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_errors_of_every_library_become_the_same(suffix: str, micro: Any, small: Path) -> None:
    """safetensors and torch tell a full disk with errors that are no OSError."""
    with pytest.raises(DiskFull, match=TOLD):
        save_checkpoint(micro.load(torch.float32), small / f"weights{suffix}", dtype=None)
    assert not list(small.iterdir())


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "broken"), RuntimeError("no disk has to do with this")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "file"):
            raise error
        assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_deploy_keeps_the_old_models_when_the_new_ones_do_not_fit(artifacts: Callable[..., Path], small: Path) -> None:
    empty = small / "repository"
    with pytest.raises(DiskFull, match=f"{empty / contract.DIT}.* must fit on its disk, {TOLD}"):
        deploy(artifacts(), empty)
    assert not list(small.iterdir())


def test_a_deployment_that_is_replaced_survives(
    artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    deploy(artifacts(), repository)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    copy, made = shutil.copyfile, []

    def second_model_is_too_large(source: Path, target: Path) -> None:
        made.append(target)
        if contract.DIT_GUIDED in str(source):
            full()
        copy(source, target)

    monkeypatch.setattr(repository_from_artifacts.shutil, "copyfile", second_model_is_too_large)
    with pytest.raises(DiskFull, match=str(repository / contract.DIT_GUIDED / "1")):
        deploy(artifacts(seed=1), repository)
    assert made and {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_no_half_of_a_deployment_is_left_to_serve(
    error: BaseException, artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    deploy(artifacts(), repository)
    replace = Path.replace

    def fails_at_the_second_model(self: Path, target: Path) -> Path:
        if contract.DIT_GUIDED in str(target) and target.name == "model.onnx":
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails_at_the_second_model)
    with pytest.raises(type(error)):
        deploy(artifacts(seed=1), repository)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must hold a deployed model.onnx"):
        loadable_models(repository, "cpu")
    assert not list(repository.glob("*/1/.*"))


def test_a_checkpoint_that_does_not_fit(micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DiskFull, match=f"{tmp_path / contract.DIT / '1' / 'checkpoint.safetensors'} must fit"):
        deploy_checkpoint(micro, tmp_path)
    assert not list(tmp_path.glob("*/1/checkpoint*"))


def test_ctrl_c_leaves_no_empty_folder(micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_from_torch, "_trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(micro, tmp_path / "build" / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_were_there_before_stay(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out" / "inner" / "model"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
