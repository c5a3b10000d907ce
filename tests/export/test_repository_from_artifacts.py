"""Deployment takes only whole, matching artifacts that fit the configs, and leaves nothing of an earlier deployment."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import repository_from_artifacts
from hunyuan3d_export.dit.configs import config_files
from hunyuan3d_export.dit.network import PRESET_FILE, preset_from_json
from hunyuan3d_export.manifest import NAME as MANIFEST
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.repository_from_artifacts import SOURCE, DeployError, deploy
from hunyuan3d_export.server.embedded import loadable_models

BASE = [contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY]
ARTIFACT = {MANIFEST, "model.onnx", "model.onnx.data"}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix not in (".py", "") or path.name == MANIFEST}


@pytest.fixture
def copied(artifacts: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """copied(**options): a copy of these artifacts, which a test may damage."""
    return lambda **options: Path(shutil.copytree(artifacts(**options), tmp_path / "artifacts", dirs_exist_ok=True))


@pytest.fixture
def in_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository in git, which deployment uses instead of the original."""
    repository = tmp_path / "model_repository"
    skip = shutil.ignore_patterns("model.*on*", "model.plan", "*.json", "__pycache__")
    shutil.copytree(SOURCE, repository, ignore=skip)
    monkeypatch.setattr(repository_from_artifacts, "SOURCE", repository)
    return repository


def test_a_new_repository_is_complete(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    repository = tmp_path / "new" / "repository"
    assert deploy(artifacts(), repository) == [contract.DIT, contract.DIT_GUIDED]
    assert loadable_models(repository, "cpu") == sorted(BASE)
    for model in (contract.DIT, contract.DIT_GUIDED):
        assert names(repository / model / "1") == ARTIFACT
        manifest = Manifest.read(repository / model / "1", hint="")
        manifest.check_files(repository / model / "1", hint="")
        assert manifest == Manifest.read(artifacts() / model, hint="")
    preset = preset_from_json(manifest.serving)
    for name, text in config_files(preset).items():
        assert (repository / name).read_text() == text
    assert {path.parent.name for path in repository.glob("*/config.pbtxt")} == set(BASE)
    for path in (path for model in BASE for path in (SOURCE / model).glob("1/*.py")):
        assert (repository / path.relative_to(SOURCE)).read_bytes() == path.read_bytes()
    assert json.loads((repository / contract.SAMPLER / "1" / PRESET_FILE).read_text()) == {
        "preset": "custom",
        "num_latents": 3072,
        "scale_factor": 0.9990943042622529,
        "cuda_memory_pool_bytes": 2 * 8 * (3072 * 64 * 4 * 2 + 1370 * 1536 * 2 + 4 + 4),
    }


def test_files_are_copies_of_their_own(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    source = shutil.copytree(artifacts(), tmp_path / "artifacts")
    deploy(source, tmp_path / "repository")
    for name in ("model.onnx", "model.onnx.data"):
        placed, original = (tmp_path / "repository" / contract.DIT / "1" / name), source / contract.DIT / name
        assert not placed.is_symlink() and placed.read_bytes() == original.read_bytes()
        assert not placed.samefile(original), "an artifact rewritten in place must not change what is served"
    shutil.rmtree(source)
    assert loadable_models(tmp_path / "repository", "cpu") == sorted(BASE)


def test_redeploying_one_graph_removes_the_other(copied: Callable[..., Path], tmp_path: Path) -> None:
    folder, repository = copied(), tmp_path / "repository"
    deploy(folder, repository)
    shutil.rmtree(folder / contract.DIT_GUIDED)
    assert deploy(folder, repository) == [contract.DIT]
    assert names(repository / contract.DIT_GUIDED / "1") == set()
    assert loadable_models(repository, "cpu") == [name for name in sorted(BASE) if name != contract.DIT_GUIDED]


def test_redeploying_distilled_weights_and_back(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(artifacts(), repository)
    assert deploy(artifacts(distilled=True), repository) == [contract.DIT]
    assert not (repository / contract.DIT_GUIDED).exists(), "there is no guided graph of distilled weights"
    config = (repository / contract.DIT / "configs" / "cpu.pbtxt").read_text()
    assert 'name: "guidance"' in config
    assert 'string_value: "consistency"' in (repository / contract.SAMPLER / "config.pbtxt").read_text()
    assert loadable_models(repository, "cpu") == [name for name in sorted(BASE) if name != contract.DIT_GUIDED]
    deploy(artifacts(), repository)
    assert loadable_models(repository, "cpu") == sorted(BASE)


def test_deploying_twice_changes_nothing(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    deploy(artifacts(), tmp_path)
    before = content(tmp_path)
    deploy(artifacts(), tmp_path)
    assert content(tmp_path) == before


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda folder: (folder / "model.onnx").unlink(), "must hold model.onnx, found none"),
    "truncated": (lambda folder: truncate(folder / "model.onnx.data"), "must have sha256 .*, got "),
    "format": (lambda folder: edit(folder, format=9), "must be a manifest of format 1, got: format 9"),
    "other weights": (
        lambda folder: edit(folder, made_from={**Manifest.read(folder, hint="").made_from, "weights": {"preset": "x"}}),
        "artifacts must come from the same weights, got .* and ",
    ),
}


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()  # a new file, because a deployed file may share the inode
    path.write_bytes(data[:-1])


def edit(folder: Path, **fields: object) -> None:
    dataclasses.replace(Manifest.read(folder, hint=""), **fields).write(folder)


@pytest.mark.parametrize("name", DAMAGE)
def test_nothing_is_placed_of_damaged_artifacts(name: str, copied: Callable[..., Path], tmp_path: Path) -> None:
    folder, repository = copied(), tmp_path / "repository"
    deploy(copied(), repository)
    before = content(repository)
    damage, message = DAMAGE[name]
    damage(folder / contract.DIT_GUIDED)
    with pytest.raises((ManifestError, DeployError), match=f"(?s){message}.*\nhint: "):
        deploy(folder, repository)
    assert content(repository) == before


def test_mixed_weights_are_refused(copied: Callable[..., Path], artifacts: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied()
    shutil.rmtree(folder / contract.DIT_GUIDED)
    shutil.copytree(artifacts(seed=1) / contract.DIT_GUIDED, folder / contract.DIT_GUIDED)
    with pytest.raises(DeployError, match="must come from the same weights.*\nhint: export them again into an empty folder"):
        deploy(folder, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_no_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="found none\nhint: make them again with: hunyuan3d-export onnx --out "):
        deploy(tmp_path / "nothing", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_in_place_only_files_that_git_ignores_appear(in_git: Path, artifacts: Callable[..., Path]) -> None:
    before = content(in_git)
    deploy(artifacts(), in_git)
    after = content(in_git)
    assert {name: after[name] for name in before} == before
    placed = {f"{model}/1/{name}" for model in (contract.DIT, contract.DIT_GUIDED) for name in ARTIFACT}
    assert set(after) - set(before) == placed | {f"{contract.SAMPLER}/1/{PRESET_FILE}"}


def test_in_place_a_preset_of_other_configs_is_refused(in_git: Path, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    before = content(in_git)
    with pytest.raises(DeployError, match="must keep its configs.*\nhint: deploy into a copy: --repository build/repository"):
        deploy(artifacts(distilled=True), in_git)
    assert content(in_git) == before
    assert deploy(artifacts(distilled=True), tmp_path / "copy") == [contract.DIT]


def test_loadable_models_says_what_is_missing(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="must be a model repository, found no config.pbtxt\nhint: hunyuan3d-export deploy"):
        loadable_models(tmp_path / "nothing", "cpu")
    deploy(artifacts(), tmp_path)
    with pytest.raises(DeployError, match="must hold a deployed model.plan for config default, found none\nhint: "):
        loadable_models(tmp_path, "default")
    for model in (contract.DIT, contract.DIT_GUIDED):
        (tmp_path / model / "1" / "model.onnx").unlink()
    with pytest.raises(DeployError, match="must hold a deployed model.onnx for config cpu, found none"):
        loadable_models(tmp_path, "cpu")


@pytest.mark.parametrize("left", ["model.plan", "model.onnx.data", "checkpoint.safetensors", ".model.onnx.data.1.partial"])
@pytest.mark.parametrize("manifest", [None, "{half"])
def test_what_an_interrupted_deploy_left_goes(
    left: str, manifest: str | None, artifacts: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights whose manifest is missing or damaged are deleted, because any config that names their file would serve them."""
    deploy(artifacts(), tmp_path)
    for model in (contract.DIT, contract.DIT_GUIDED):
        (tmp_path / model / "1" / left).write_bytes(b"of other weights")
        (tmp_path / model / "1" / MANIFEST).unlink()
        if manifest is not None:
            (tmp_path / model / "1" / MANIFEST).write_text(manifest)
    deploy(artifacts(), tmp_path)
    assert names(tmp_path / contract.DIT / "1") == names(tmp_path / contract.DIT_GUIDED / "1") == ARTIFACT
