"""A container loads the models whose files are deployed: the same models as `hunyuan3d-export serve` loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_client import Client, contract
from hunyuan3d_export import files
from hunyuan3d_export.repository_from_artifacts import SOURCE, deploy, deploy_checkpoint
from hunyuan3d_export.server import loadable as rule
from hunyuan3d_export.server.embedded import loadable_models


@pytest.fixture
def loadable(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], set[str]]:
    # The container has loadable.py as a file by itself, without the package around it.
    monkeypatch.syspath_prepend(root / "export" / "hunyuan3d_export" / "server")
    from loadable import loadable

    return lambda repository, config: {folder.name for folder in loadable(repository, config).models}


@pytest.fixture
def whole(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the repository in git with all its models, the graphs of the denoisers and no image encoder."""
    repository = tmp_path / "models"
    shutil.copytree(
        SOURCE, repository, ignore=shutil.ignore_patterns("model.onnx*", "model.plan*", "checkpoint.*", "*.json", "__pycache__")
    )
    deploy(artifacts(), tmp_path / "deployed")
    for model in (contract.DIT, contract.DIT_GUIDED):
        shutil.copytree(tmp_path / "deployed" / model, repository / model, dirs_exist_ok=True)
    return repository


def test_the_same_as_serve_loads(loadable: Any, whole: Path, micro: Any, tmp_path: Path) -> None:
    assert rule.VERSION == files.VERSION
    assert loadable(whole, "cpu") == set(loadable_models(whole, "cpu"))
    (whole / contract.DIT_GUIDED / "1" / "model.onnx").unlink()
    assert loadable(whole, "cpu") == set(loadable_models(whole, "cpu"))
    deploy_checkpoint(micro, tmp_path / "torch")
    assert loadable(tmp_path / "torch", "torch") == set(loadable_models(tmp_path / "torch", "torch"))
    assert contract.DIT not in loadable(whole, "default")


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


LANES = '"lanes"\n  value {\n    string_value: "%d"'


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("gpus: 0", "gpus: 0\n  gpus: 1", 2),
        ("gpus: 0", "gpus: [0, 1, 2]", 3),
        ("count: 1", "count: 2", 2),
    ],
)
def test_lanes_that_leave_instances_idle_are_told(old: str, new: str, count: int, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(SOURCE, repository, ignore=shutil.ignore_patterns("model.onnx*", "checkpoint.*", "__pycache__"))
    for model in (contract.DIT, contract.DIT_GUIDED):
        (repository / model / "1" / "model.plan").touch()
    assert rule.loadable(repository, "default").warnings == []
    for model in (contract.DIT, contract.DIT_GUIDED):
        edited(repository / model / "config.pbtxt", old, new)
    assert rule.loadable(repository, "default").warnings == [
        f"{contract.SAMPLER}: lanes must be {count}, one for each instance of {model}, got 1; "
        "set both in their configs, or instances stay idle or calls wait"
        for model in (contract.DIT, contract.DIT_GUIDED)
    ]
    edited(repository / contract.SAMPLER / "config.pbtxt", LANES % 1, LANES % count)
    assert rule.loadable(repository, "default").warnings == []


@pytest.mark.served
def test_what_is_not_deployed_does_not_keep_the_server_from_starting(whole: Path, run: Callable[..., Any]) -> None:
    with run(MODEL_REPOSITORY=str(whole)) as container:
        container.wait_ready()
        with Client(container.grpc, timeout_s=60) as client:
            names = {model.name for model in client.health().models}
        assert contract.SAMPLER in names and contract.CONDITIONER not in names
    assert any("hunyuan3d_conditioner: not served, config cpu wants model.onnx" in line for line in container.log)
