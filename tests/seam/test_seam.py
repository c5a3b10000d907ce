"""A new network needs one folder, one row of NETWORKS and one row of the contract: no other file changes.

The toy network goes all the way from its export to a real server.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from hunyuan3d_client import contract
from hunyuan3d_export import parity
from hunyuan3d_export.engine_from_onnx import EngineOptions, build_engines, parse_profile
from hunyuan3d_export.engines.targets import find_target
from hunyuan3d_export.graphs import GraphOption
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.networks import NETWORKS
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.repository_from_artifacts import DeployError, deploy
from hunyuan3d_export.runners import OnnxRunner
from hunyuan3d_export.server.embedded import EmbeddedServer, loadable_models

ARROWS = (
    "onnx_from_torch", "engine_from_onnx", "repository_from_artifacts", "parity", "manifest", "files", "pbtxt", "runners",
    "graphs", "checks",
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The toy's module, whose rows are in the tables during a test."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(contract.AXES, "N", contract.AxisRange(1, 16, 64))
    monkeypatch.setitem(contract.AXIS_NAMES, "N", "toys")
    from toy import network

    monkeypatch.setitem(contract.MODELS, network.MODEL, network.SPEC)
    monkeypatch.setitem(NETWORKS, "toy", network.ROW)
    yield network
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.mark.served
def test_an_unknown_network_goes_all_the_way(toy: object, tmp_path: Path) -> None:
    source = toy.ToySource(seed=3)
    (folder,) = export_onnx(source, tmp_path / "onnx")
    assert export_onnx(source, tmp_path / "onnx") == [folder], "unchanged, kept"
    (checks,) = parity.verify(tmp_path / "onnx").values()
    assert [check.name for check in checks] == ["near", "far"]
    assert all(check.passed and check.relative_l2 < 1e-5 for check in checks)

    half = export_onnx(source, tmp_path / "half", options=OnnxOptions(precision="fp16"))
    options = EngineOptions(profile=parse_profile(["toys=1..8..32"]))
    (plan,) = build_engines(half[0].parent, tmp_path / "plans", find_target("tensorrt-rtx", ("SM89",)), options)
    tensors = Manifest.read(plan, hint="").tensors
    assert tensors["points"]["profile"] == [[1, 1, 3], [2, 8, 3], [8, 32, 3]] and set(tensors) == {"points", "near", "far"}

    deploy(tmp_path / "onnx", tmp_path / "repository")
    assert loadable_models(tmp_path / "repository", "cpu") == ["toy"]
    points = np.random.default_rng(0).uniform(-1, 1, (2, 9, 3)).astype(np.float32)
    with (
        EmbeddedServer(tmp_path / "repository") as endpoints,
        tritonclient.grpc.InferenceServerClient(endpoints.grpc) as client,
    ):
        tensor = tritonclient.grpc.InferInput("points", list(points.shape), "FP32")
        answer = client.infer("toy", [tensor.set_data_from_numpy(points)])
        with pytest.raises(InferenceServerException, match="points must be"):
            client.infer("toy", [tensor.set_data_from_numpy(points + 2)])  # values outside the contract's range
    expected = source.load(torch.float32)(torch.from_numpy(points))
    for name, value in zip(("near", "far"), expected, strict=True):
        np.testing.assert_allclose(answer.as_numpy(name), value.detach().numpy(), atol=1e-5)


def test_a_network_declares_options_of_its_own(toy: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def prepare(network: torch.nn.Module, options: dict[str, str]) -> torch.nn.Module:
        seen.append(options)
        return network

    option = GraphOption(values=("plus", "minus"), default="plus", for_plans="minus")
    monkeypatch.setitem(NETWORKS, "toy", dataclasses.replace(toy.ROW, options={"sign": option}, prepare=prepare))
    for options, value in (
        (OnnxOptions(), "plus"),
        (OnnxOptions(for_plans=True), "minus"),
        (OnnxOptions(for_plans=True, choices={"sign": "plus"}), "plus"),
    ):
        (folder,) = export_onnx(toy.ToySource(), tmp_path / "onnx", options=options)
        assert Manifest.read(folder, hint="").made_from["options"] == seen[-1] == {"sign": value}
    assert len(seen) == 3, "another value makes the graph stale"
    with pytest.raises(ValueError, match="graph option must be one of none, got 'sign'"):
        monkeypatch.setitem(NETWORKS, "toy", toy.ROW)
        export_onnx(toy.ToySource(), tmp_path / "onnx", options=OnnxOptions(choices={"sign": "plus"}))


def test_its_plans_are_compared_and_its_errors_name_its_own_command(
    toy: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = export_onnx(toy.ToySource(), tmp_path / "onnx", options=OnnxOptions(precision="fp16"))[0].parent
    build_engines(onnx, tmp_path / "plans", find_target("tensorrt-rtx", ("SM89",)))
    whole = parity.TorchRunner
    monkeypatch.setattr(parity, "PlanRunner", lambda _plans, _target: OnnxRunner(onnx))
    monkeypatch.setattr(parity, "TorchRunner", lambda network, graphs, **_: whole(network, graphs))
    (checks,) = parity.verify_engines(tmp_path / "plans", onnx=onnx).values()
    assert [check.name for check in checks] == ["near, torch", "far, torch", "near, ONNX Runtime", "far, ONNX Runtime"]
    with pytest.raises(DeployError, match="must hold a plan that a config of toy serves, got one of target tensorrt-rtx"):
        deploy(tmp_path / "plans", tmp_path / "repository")
    (onnx / "toy" / "model.onnx").write_bytes(b"")
    with pytest.raises(ManifestError, match="must have sha256 .*\nhint: export again with: python -m toy"):
        parity.verify(onnx)


def test_a_network_that_needs_another_is_not_deployed_alone(
    toy: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "toy", dataclasses.replace(toy.ROW, beside=("dit",)))
    export_onnx(toy.ToySource(), tmp_path / "onnx")
    with pytest.raises(DeployError, match="must hold a deployed denoiser for the toy to join, found none"):
        deploy(tmp_path / "onnx", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_manifest_of_another_network_is_an_error_of_the_manifest(toy: object, tmp_path: Path) -> None:
    (folder,) = export_onnx(toy.ToySource(), tmp_path / "onnx")
    manifest = Manifest.read(folder, hint="")
    dataclasses.replace(manifest, serving={"image_size": 518}).write(folder)
    with pytest.raises(
        ManifestError, match="the manifest of toy must say what a toy is served with.*\nhint: make it again with"
    ):
        deploy(tmp_path / "onnx", tmp_path / "repository")
    renamed = folder.with_name("unknown")
    shutil.move(folder, renamed)
    dataclasses.replace(manifest, model="unknown").write(renamed)
    with pytest.raises(ManifestError, match="model must be one of .*, got unknown"):
        parity.verify(tmp_path / "onnx")


@pytest.mark.parametrize("arrow", ARROWS)
def test_no_arrow_names_a_network(arrow: str, root: Path) -> None:
    text = (root / "export" / "hunyuan3d_export" / f"{arrow}.py").read_text()
    models = [model for network in NETWORKS.values() for model in network.models]
    names = [*NETWORKS, *models, "DIT", "DIT_GUIDED", "CONDITIONER", "Hunyuan3DDiT", "velocity", "denoiser"]
    names += [option for network in NETWORKS.values() for option in network.options]
    assert [name for name in names if re.search(rf"\b{name}\b", text)] == []
