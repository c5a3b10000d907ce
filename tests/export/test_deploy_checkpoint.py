"""A deployed checkpoint: its weights are stored once, whole and in upstream's format, and replace an earlier deployment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan3d_client import contract
from hunyuan3d_export.checkpoints import CheckpointError
from hunyuan3d_export.dit import load_checkpoint
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.manifest import NAME as MANIFEST
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.pbtxt import artifact_file, read_config
from hunyuan3d_export.repository_from_artifacts import SOURCE, DeployError, deploy, deploy_checkpoint
from hunyuan3d_export.server.embedded import loadable_models

BASE = sorted([contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY])
CHECKPOINT = Path(contract.DIT) / "1" / "checkpoint.safetensors"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_weights_are_there(precision: str, dtype: torch.dtype, micro: Any, tmp_path: Path) -> None:
    assert deploy_checkpoint(micro, tmp_path, precision=precision) == [contract.DIT, contract.DIT_GUIDED]
    assert loadable_models(tmp_path, "torch") == BASE
    found, expected = load_checkpoint(tmp_path / CHECKPOINT).state_dict(), micro.load(dtype).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    manifest = Manifest.read(tmp_path / contract.DIT / "1", hint="")
    manifest.check_files(tmp_path / contract.DIT / "1", hint="")
    assert manifest.made_from == {"weights": micro.identity(), "precision": precision, "runtime": "torch"}


def test_both_models_read_one_file(micro: Any, tmp_path: Path) -> None:
    deploy_checkpoint(micro, tmp_path)
    for model in (contract.DIT, contract.DIT_GUIDED):
        file = artifact_file(read_config(tmp_path / model, "torch"))
        assert (tmp_path / model / "1" / str(file)).resolve() == (tmp_path / CHECKPOINT).resolve()
    assert not (tmp_path / contract.DIT_GUIDED / "1" / MANIFEST).exists()


def test_unchanged_weights_are_kept(micro: Any, micro_weights: Callable[..., Any], tmp_path: Path) -> None:
    deploy_checkpoint(micro, tmp_path)
    before, content = (tmp_path / CHECKPOINT).stat().st_ino, (tmp_path / CHECKPOINT).read_bytes()
    deploy_checkpoint(micro, tmp_path, torch=torch_parameters(["dtype=bf16"]))
    assert (tmp_path / CHECKPOINT).stat().st_ino == before
    assert read_config(tmp_path / contract.DIT, "torch").parameters["dtype"].string_value == "bf16"
    deploy_checkpoint(micro_weights(seed=1), tmp_path)
    # Not by the inode, which the file system may give to the new file once the old one is removed.
    assert (tmp_path / CHECKPOINT).read_bytes() != content
    with (tmp_path / CHECKPOINT).open("r+b") as file:
        file.truncate(1000)
    deploy_checkpoint(micro_weights(seed=1), tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT)


def test_it_takes_the_place_of_graphs_and_they_of_it(micro: Any, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    deploy(artifacts(), tmp_path)
    deploy_checkpoint(micro, tmp_path)
    assert not list(tmp_path.rglob("model.onnx*"))
    with pytest.raises(DeployError, match="must hold a deployed model.onnx for config cpu, found none"):
        loadable_models(tmp_path, "cpu")
    deploy(artifacts(), tmp_path)
    assert loadable_models(tmp_path, "cpu") == BASE and not (tmp_path / CHECKPOINT).exists()
    with pytest.raises(DeployError, match="for config torch, found none\nhint: hunyuan3d-export deploy --checkpoint FILE"):
        loadable_models(tmp_path, "torch")


def test_distilled_weights_have_no_guided_model(micro_distilled: Any, tmp_path: Path) -> None:
    assert deploy_checkpoint(micro_distilled, tmp_path) == [contract.DIT]
    assert contract.DIT_GUIDED not in loadable_models(tmp_path, "torch")


def test_the_repository_in_git_keeps_its_parameters(micro: Any) -> None:
    with pytest.raises(DeployError, match=r"must keep its configs.*torch.pbtxt.*\nhint: deploy into a copy"):
        deploy_checkpoint(micro, SOURCE, torch=torch_parameters(["dtype=fp16"]))
    assert not (SOURCE / CHECKPOINT).exists()


def test_a_precision_we_do_not_have(micro: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16, got 'fp8'"):
        deploy_checkpoint(micro, tmp_path / "repository", precision="fp8")
    assert not (tmp_path / "repository").exists()


def test_weights_that_cannot_be_loaded_leave_the_deployment_as_it_was(
    micro: Any, micro_weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy_checkpoint(micro, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def load(_weights: Weights, _dtype: torch.dtype) -> Any:
        raise CheckpointError("NaN")

    monkeypatch.setattr(Weights, "load", load)
    with pytest.raises(CheckpointError, match="NaN"):
        deploy_checkpoint(micro_weights(seed=1), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_interrupted_write_leaves_nothing(micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", save)
    with pytest.raises(KeyboardInterrupt):
        deploy_checkpoint(micro, tmp_path)
    version = tmp_path / contract.DIT / "1"
    assert not [path.name for path in version.iterdir() if path.suffix != ".py"]
