"""verify tells right artifacts from wrong ones, and writes its findings into a receipt."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hunyuan3d_client import contract
from hunyuan3d_export.checks import Check, relative_l2
from hunyuan3d_export.dit import network
from hunyuan3d_export.dit.network import CASES, TOLERANCES, Tolerance, example_inputs
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import NAME as MANIFEST
from hunyuan3d_export.manifest import Manifest, ManifestError, file_digests, reusable
from hunyuan3d_export.parity import RECEIPT, verify


@pytest.fixture
def copied(artifacts: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of some artifacts to write receipts into."""
    return lambda **options: Path(shutil.copytree(artifacts(**options), tmp_path / "artifacts"))


def receipt(folder: Path) -> dict:
    return json.loads((folder / RECEIPT).read_text())


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def verified(
    request: pytest.FixtureRequest, artifacts: Callable[..., Path], micro: Weights, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, list[Check]]]:
    """A precision, a copy of its artifacts with receipts, and what verify returned."""
    folder = Path(shutil.copytree(artifacts(precision=request.param), tmp_path_factory.mktemp("verified") / "artifacts"))
    return request.param, folder, verify(folder, micro)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sampling steps, for tests that single evaluations already decide."""
    monkeypatch.setattr(network, "_MOST_STEPS", 6)


def test_right_artifacts_pass(verified: tuple[str, Path, dict[str, list[Check]]]) -> None:
    precision, _, results = verified
    assert list(results) == [contract.DIT, contract.DIT_GUIDED]
    for checks in results.values():
        assert [check.sizes for check in checks[:-1]] == list(CASES)
        assert all(check.passed and check.relative_l2 > 0 for check in checks), checks
        assert {check.tolerance for check in checks[:-1]} == {TOLERANCES[precision].evaluation}
        assert checks[-1].tolerance == TOLERANCES[precision].sampling
    assert results[contract.DIT][-1].name == "50 steps, two-batch"
    assert results[contract.DIT_GUIDED][-1].name == "50 steps, guided"


def test_receipt_holds_what_was_found(verified: tuple[str, Path, dict[str, list[Check]]]) -> None:
    _, folder, results = verified
    for model, checks in results.items():
        found = receipt(folder / model)
        assert set(found) == {"model", "manifest_sha256", "checks", "versions"}
        assert found["model"] == model
        assert found["manifest_sha256"] == sha256(folder / model / MANIFEST)
        assert found["checks"] == [
            {**dataclasses.asdict(check), "sizes": list(check.sizes), "passed": check.passed} for check in checks
        ]
        assert found["versions"]["torch"] == torch.__version__ and "onnxruntime" in found["versions"]


def test_a_receipt_is_not_part_of_the_artifact(verified: tuple[str, Path, dict[str, list[Check]]]) -> None:
    _, folder, results = verified
    for model in results:
        manifest = Manifest.read(folder / model, hint="")
        manifest.check_files(folder / model, hint="")
        assert RECEIPT not in manifest.files and reusable(folder / model, manifest.made_from)


def test_distilled_is_sampled_by_its_own_path(copied: Callable[..., Path], micro_distilled: Weights) -> None:
    results = verify(copied(distilled=True), micro_distilled)
    assert list(results) == [contract.DIT]
    assert results[contract.DIT][-1].name == "5 steps, distilled"
    assert all(check.passed for check in results[contract.DIT])


def test_bf16_gets_an_empty_receipt(copied: Callable[..., Path], micro: Weights) -> None:
    folder = copied(precision="bf16")
    assert verify(folder, micro) == {contract.DIT: [], contract.DIT_GUIDED: []}
    assert receipt(folder / contract.DIT)["checks"] == []


@pytest.mark.usefixtures("few_steps")
def test_a_forged_artifact_fails(copied: Callable[..., Path], artifacts: Callable[..., Path], micro: Weights) -> None:
    """The graphs are of another seed than their manifest claims: every digest fits, but the velocities do not."""
    folder = copied()
    for model in (contract.DIT, contract.DIT_GUIDED):
        manifest = Manifest.read(folder / model, hint="")
        for name in manifest.files:
            shutil.copyfile(artifacts(seed=1) / model / name, folder / model / name)
        dataclasses.replace(manifest, files=file_digests(folder / model)).write(folder / model)
    results = verify(folder, micro)
    for model, checks in results.items():
        assert not any(check.passed for check in checks), checks
        assert not any(check["passed"] for check in receipt(folder / model)["checks"])


@pytest.mark.usefixtures("few_steps")
def test_fp16_passed_off_as_fp32_fails(copied: Callable[..., Path], micro: Weights) -> None:
    folder = copied(precision="fp16")
    for model in (contract.DIT, contract.DIT_GUIDED):
        manifest = Manifest.read(folder / model, hint="")
        dataclasses.replace(manifest, made_from={**manifest.made_from, "precision": "fp32"}).write(folder / model)
    assert not any(check.passed for checks in verify(folder, micro).values() for check in checks)


def test_other_weights_are_refused(copied: Callable[..., Path], micro_weights: Callable[..., Weights]) -> None:
    folder = copied()
    with pytest.raises(ManifestError, match=f"{contract.DIT} must be made from these weights"):
        verify(folder, micro_weights(seed=1))
    with pytest.raises(ManifestError, match="must be made from these weights"):
        verify(folder, Weights(preset="tiny"))
    assert not list(folder.rglob(RECEIPT))


def test_a_checkpoints_artifacts_need_the_checkpoint(copied: Callable[..., Path]) -> None:
    with pytest.raises(ManifestError, match="which must be given, got none\nhint: --checkpoint FILE"):
        verify(copied())


@pytest.mark.usefixtures("few_steps")
def test_the_checkpoint_alone_names_the_weights(copied: Callable[..., Path], micro_distilled: Weights) -> None:
    """The artifact records the preset that it was exported with, so verify needs no --preset."""
    results = verify(copied(distilled=True), Weights(checkpoint=micro_distilled.checkpoint))
    assert all(check.passed for check in results[contract.DIT])


def test_damaged_artifacts_are_refused_before_anything_runs(copied: Callable[..., Path], micro: Weights) -> None:
    folder = copied()
    (folder / contract.DIT_GUIDED / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ManifestError, match="must have sha256 .*\nhint: export again with: hunyuan3d-export onnx"):
        verify(folder, micro)
    assert not list(folder.rglob(RECEIPT))


def test_passed_means_a_number_within_the_tolerance() -> None:
    assert Check("evaluation", (1, 2, 3), 1e-5, 0.0, 1e-5).passed
    assert not Check("evaluation", (1, 2, 3), 1.1e-5, 0.0, 1e-5).passed
    assert not Check("evaluation", (1, 2, 3), float("nan"), 0.0, 1e-5).passed


def test_tolerances_are_those_promised() -> None:
    assert TOLERANCES == {
        "fp32": Tolerance(1e-5, 1e-4),
        "fp16": Tolerance(5e-3, 3e-2),
        "bf16": Tolerance(4e-2, 2e-1),
    }


def test_relative_l2_by_its_definition() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_l2(expected, expected) == 0
    assert relative_l2(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_l2(expected.half(), expected.double()) == 0


def test_example_inputs_fit_the_contract_and_float16() -> None:
    inputs = example_inputs((2, 5, 7))
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "latents": (2, 5, contract.LATENT_CHANNELS),
        "t": (2,),
        "context": (2, 7, contract.CONTEXT_WIDTH),
    }
    assert inputs["context"].dtype == torch.float16 and (0 <= inputs["t"]).all() and (inputs["t"] <= 1).all()
    assert all(torch.equal(value, example_inputs((2, 5, 7))[name]) for name, value in inputs.items())
    assert not torch.equal(inputs["latents"], example_inputs((2, 5, 7), seed=1)["latents"])
