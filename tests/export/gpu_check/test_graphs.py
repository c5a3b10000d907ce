"""Packed graphs: small without their weights, and with those of the seed the very artifact that the exporter writes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from hunyuan3d_client import contract
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.engines.structure import structure_digest
from hunyuan3d_export.files import ONNX_FILE
from hunyuan3d_export.gpu_check import graphs
from hunyuan3d_export.gpu_check.graphs import Contents, Pantry, Recipe
from hunyuan3d_export.gpu_check.rows import Skip
from hunyuan3d_export.gpu_check.setting import Setting
from hunyuan3d_export.manifest import Manifest, read_artifacts

MODELS = [contract.DIT, contract.DIT_GUIDED]


@pytest.fixture(scope="module")
def exported(artifacts: Callable[..., Path]) -> Path:
    return artifacts(Weights(preset="tiny"), precision="fp16")


@pytest.fixture(scope="module")
def packed(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # the export is the expensive part, and it is there already
        patch.setattr(graphs, "export_onnx", lambda *_, **__: [exported / model for model in MODELS])
        return graphs.pack(Contents("tiny", "fp16"), tmp_path_factory.mktemp("graphs"))


def weights(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_what_comes_back_is_what_was_exported(packed: Path, exported: Path, tmp_path: Path) -> None:
    graphs.unpack(packed, Contents("tiny", "fp16"), tmp_path / "out")
    assert [folder.name for folder in read_artifacts(tmp_path / "out", hint="")] == MODELS
    for model in MODELS:
        found, wanted = (folder / model / ONNX_FILE for folder in (tmp_path / "out", exported))
        assert structure_digest(found) == structure_digest(wanted)
        expected = weights(wanted)
        assert weights(found).keys() == expected.keys()
        assert all(np.array_equal(value, expected[name]) for name, value in weights(found).items())
        manifests = [Manifest.read(path.parent, hint="") for path in (found, wanted)]
        assert manifests[0].made_from == manifests[1].made_from


def test_it_is_small_enough_to_carry(packed: Path, exported: Path) -> None:
    whole = sum(path.stat().st_size for path in exported.rglob("*.data"))
    assert packed.stat().st_size < min(60_000, whole / 50)


def test_other_code_makes_it_stale(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as old:
        old.writestr("code", "of yesterday")
    with pytest.raises(Skip, match="old.zip was packed by other code; make gpu-check-graphs"):
        graphs.unpack(tmp_path / "old.zip", Contents("tiny", "fp16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_unpacks_once_and_says_what_is_missing(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"build": tmp_path / "build", "graphs": packed.parent, "work": tmp_path}
    setting = Setting(device=torch.device("cpu"), presets=("tiny",), steps=2, attention_length=8, row_s=0.01, **places)
    folder = graphs.artifacts_of(setting, Contents("tiny", "fp16"))
    assert folder == tmp_path / "tiny-fp16" and (folder / contract.DIT / ONNX_FILE).is_file()
    monkeypatch.setattr(graphs, "unpack", lambda *_: pytest.fail("it is there"))
    assert graphs.artifacts_of(setting, Contents("tiny", "fp16")) == folder
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Skip, match="needs onnxscript, and tiny-fp32.zip is not there; make gpu-check-graphs"):
        graphs.artifacts_of(setting, Contents("tiny", "fp32"))


STATE = {
    "a": np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32),
    "b": np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32),
    "c": np.random.default_rng(2).standard_normal(70).astype(np.float32),
    "d": np.random.default_rng(3).standard_normal(30).astype(np.float32),
}
FORMS = {
    "as it is": lambda: STATE["a"],
    "transposed": lambda: STATE["a"].T,
    "rows cut out": lambda: STATE["a"][5:30],
    "columns cut out": lambda: STATE["a"][:, 3:21].T,
    "columns cut out, not transposed": lambda: STATE["a"][:, 3:21],
    "joined": lambda: np.concatenate([STATE["b"], STATE["a"][7:]]),
    "joined side by side": lambda: np.concatenate([STATE["a"].T, STATE["b"].T], axis=1),
    "vector": lambda: STATE["c"],
    "joined vectors": lambda: np.concatenate([STATE["d"], STATE["c"]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_the_exporter_turned_cut_or_joined_are_found(form: str) -> None:
    wanted = np.ascontiguousarray(FORMS[form]())
    recipe = Pantry(STATE).recipe(wanted)
    assert recipe is not None
    np.testing.assert_array_equal(recipe.make(STATE), wanted)


def test_numbers_of_no_tensor_have_no_recipe() -> None:
    pantry, other = Pantry(STATE), STATE["a"].copy()
    other[3, -1] += 1  # beyond the first elements, by which rows are looked up
    assert pantry.recipe(other) is None
    assert pantry.recipe(np.ones((8, 24), np.float32)) is None
    assert Recipe((("a", "rows", 0, 2),), True).make(STATE).shape == (24, 2)
