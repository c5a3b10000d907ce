"""An image encoder joins deployed denoisers, stays when they are replaced, and leaves a repository without one as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import repository_from_artifacts
from hunyuan3d_export.conditioner.configs import config_files
from hunyuan3d_export.conditioner.weights import ConditionerServing
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.repository_from_artifacts import SOURCE, DeployError, deploy, deploy_checkpoint
from hunyuan3d_export.server.embedded import loadable_models

Export = Callable[..., Path]
WITHOUT = sorted([contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY])
_OF_OTHERS = {
    contract.BACKGROUND,
    contract.VAE,
    contract.FIELD,
    contract.MESH,
    contract.MESH_UNARY,
    contract.PICTURE_MESH,
    contract.PICTURE_MESH_UNARY,
}
EVERYTHING = sorted(set(contract.MODELS) - _OF_OTHERS)
IMAGE_MODELS = set(EVERYTHING) - set(WITHOUT)


def image_config_files(image_size: int = 518) -> dict[str, str]:
    return config_files(ConditionerServing(image_size))


def image_texts(repository: Path) -> dict[str, str]:
    return {name: (repository / name).read_text() for name in image_config_files()}


def test_it_joins_and_stays(artifacts: Export, exported: Export, tmp_path: Path) -> None:
    deploy(artifacts(), tmp_path)
    assert loadable_models(tmp_path, "cpu") == WITHOUT
    assert deploy(exported(), tmp_path) == [contract.CONDITIONER]
    assert loadable_models(tmp_path, "cpu") == EVERYTHING
    deploy(artifacts(seed=1), tmp_path)
    assert loadable_models(tmp_path, "cpu") == EVERYTHING
    manifest = Manifest.read(tmp_path / contract.CONDITIONER / "1", hint="")
    manifest.check_files(tmp_path / contract.CONDITIONER / "1", hint="")


def test_one_folder_of_artifacts_for_all(artifacts: Export, exported: Export, tmp_path: Path) -> None:
    for folder in (artifacts(distilled=True), exported()):
        shutil.copytree(folder, tmp_path / "artifacts", dirs_exist_ok=True)
    assert deploy(tmp_path / "artifacts", tmp_path / "repository") == [contract.CONDITIONER, contract.DIT]
    served = [name for name in EVERYTHING if name != contract.DIT_GUIDED]
    assert loadable_models(tmp_path / "repository", "cpu") == served


def test_another_picture_size_has_configs_of_its_own(artifacts: Export, exported: Export, tmp_path: Path) -> None:
    deploy(artifacts(), tmp_path)
    assert not [model for model in IMAGE_MODELS if (tmp_path / model).exists()], "Triton would try to load them"
    deploy(exported(image_size=1022), tmp_path)
    assert image_texts(tmp_path) == image_config_files(1022)
    deploy(artifacts(seed=1), tmp_path)
    assert image_texts(tmp_path) == image_config_files(1022), "the encoder is still the one of 1022 pixels"
    deploy(exported(), tmp_path)
    assert image_texts(tmp_path) == image_config_files(518)


def test_in_place(artifacts: Export, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(SOURCE, repository, ignore=shutil.ignore_patterns("model.*on*", "model.plan", "*.json", "__pycache__"))
    monkeypatch.setattr(repository_from_artifacts, "SOURCE", repository)
    with pytest.raises(DeployError, match="must hold a deployed denoiser for the image encoder to join, found none\nhint: "):
        deploy(exported(), repository)
    deploy(artifacts(), repository)
    with pytest.raises(DeployError, match="must keep its configs, and the image encoder needs others"):
        deploy(exported(image_size=1022), repository)
    deploy(exported(), repository)
    assert loadable_models(repository, "cpu") == EVERYTHING


def test_the_torch_runtime_serves_no_pictures(micro: object, exported: Export, tmp_path: Path) -> None:
    deploy_checkpoint(micro, tmp_path)
    deploy(exported(), tmp_path)
    assert loadable_models(tmp_path, "torch") == WITHOUT
