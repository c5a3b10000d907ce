"""The decoder's artifacts: ONNX Runtime against torch, precision, reuse, TensorRT for RTX, and the command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from hunyuan3d_client import contract
from hunyuan3d_export import parity
from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.commands import app
from hunyuan3d_export.engine_from_onnx import EngineOptions, build_engines, parse_profile
from hunyuan3d_export.engines.targets import find_target
from hunyuan3d_export.files import ONNX_FILE
from hunyuan3d_export.manifest import Manifest, ManifestError, reusable
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.runners import OnnxRunner
from hunyuan3d_export.shapevae import PRESETS, ShapeVAEPreset
from hunyuan3d_export.shapevae.network import TOLERANCES, graphs, in_precision
from hunyuan3d_export.shapevae.weights import ShapeVAESource

Export = Callable[..., Path]
Sources = Callable[..., ShapeVAESource]
Draw = Callable[..., tuple[Tensor, Tensor]]
SCALE = PRESETS["v2-mini"].scale_factor


def in_onnx(folder: Path, latents: Tensor, queries: Tensor) -> Tensor:
    """The field by both graphs, one after the other."""
    runner = OnnxRunner(folder)
    shape = runner.run(contract.VAE, {"latents": latents})
    return runner.run(contract.FIELD, {"queries": queries, **shape})["field"]


def in_torch(source: ShapeVAESource, latents: Tensor, queries: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    decoder = source.load(dtype)
    return decoder.field(queries.to(dtype), *decoder.keys_values(latents.to(dtype) / SCALE))


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_onnx_runtime_computes_what_torch_computes(variant: str, exported: Export, source: Sources, draw: Draw) -> None:
    folder = exported(variant=variant)
    results = parity.verify(folder, source(variant))
    assert list(results) == [contract.FIELD, contract.VAE]
    for model, checks in results.items():
        assert len(checks) == (3 if model == contract.FIELD else 6)
        for check in checks:
            assert 0 < check.relative_l2 <= 1e-5 == check.tolerance, check
    for sizes in ((1, 5, 300), (3, 40, 7), (2, 1, 1)):
        inputs = draw(64, *sizes, torch.float32)
        assert relative_l2(in_onnx(folder, *inputs), in_torch(source(variant), *inputs)) <= 1e-5, sizes


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_half_precision(variant: str, exported: Export, source: Sources, draw: Draw) -> None:
    """The root mean square error of the field is at most 1/1000 of its standard deviation."""
    folder = exported(precision="fp16", variant=variant)
    inputs = draw(64, 1, 60, 2000, torch.float32)
    expected = in_torch(source(variant), *inputs, dtype=torch.float64)
    error = (in_onnx(folder, *inputs).double() - expected).square().mean().sqrt() / expected.std()
    assert 1e-5 < error <= 1e-3
    for checks in parity.verify(folder, source(variant)).values():
        assert all(1e-6 < check.relative_l2 <= check.tolerance == TOLERANCES[checks_model(check)]["fp16"] for check in checks)


def checks_model(check: Any) -> str:
    return contract.FIELD if check.name.startswith("field") else contract.VAE


def test_the_graphs(exported: Export) -> None:
    for precision, wire in (("fp32", onnx.TensorProto.FLOAT), ("fp16", onnx.TensorProto.FLOAT16)):
        vae, field = (
            onnx.load(exported(precision=precision) / name / ONNX_FILE).graph for name in (contract.VAE, contract.FIELD)
        )
        assert [described(tensor) for tensor in vae.input] == [("latents", onnx.TensorProto.FLOAT, ["B", "L", 64])]
        keys_values = [("k", wire, ["B", 2, "L", 64]), ("v", wire, ["B", 2, "L", 64])]
        assert [described(tensor) for tensor in vae.output] == keys_values
        queries = ("queries", onnx.TensorProto.FLOAT, ["B", "P", 3])
        assert [described(tensor) for tensor in field.input] == [queries, *keys_values]
        assert [described(tensor) for tensor in field.output] == [("field", onnx.TensorProto.FLOAT, ["B", "P"])]
        assert "Attention" in {node.op_type for node in field.node} & {node.op_type for node in vae.node}


def described(tensor: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    kind = tensor.type.tensor_type
    return tensor.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]


def test_sines_of_a_half_precision_graph_are_float32(exported: Export) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(exported(precision="fp16") / contract.FIELD / ONNX_FILE))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input)}
    waves = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    assert len(waves) == 2 and all(kinds[node.input[0]] == onnx.TensorProto.FLOAT for node in waves)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    assert {kinds[name] for name in attention.input[:3]} == {onnx.TensorProto.FLOAT16}


def test_an_unchanged_artifact_is_kept_and_another_scale_factor_makes_it_stale(exported: Export, source: Sources) -> None:
    folder = exported() / contract.VAE
    manifest = Manifest.read(folder, hint="")
    assert reusable(folder, manifest.made_from)
    before = (folder / ONNX_FILE).stat().st_mtime_ns
    assert (exported() / contract.VAE / ONNX_FILE).stat().st_mtime_ns == before
    assert source(scale_factor=1.25).identity() != source().identity() == manifest.made_from["weights"]
    assert manifest.serving["scale_factor"] == SCALE and manifest.serving["keys_values"] == "FP32"


def test_the_scale_factor_is_part_of_the_graph(source: Sources, draw: Draw) -> None:
    latents, queries = draw(64, 1, 5, 9, torch.float32)
    decoder, preset = source().load(torch.float32), in_precision(source().serving(), "fp32")

    def field_of(preset: ShapeVAEPreset) -> Tensor:
        both = graphs(preset)
        k, v = both["vae"].module(decoder)(latents)
        values: Tensor = both["field"].module(decoder)(queries, k, v)
        return values

    expected = in_torch(source(), latents, queries)
    assert relative_l2(field_of(preset), expected) < 1e-6
    assert relative_l2(field_of(dataclasses.replace(preset, scale_factor=1.25)), expected) > 1e-3
    rounded = relative_l2(field_of(in_precision(preset, "fp16")), expected)
    assert 1e-5 < rounded < 5e-4, "keys and values in float16 would be the largest error of an fp32 graph"


def test_tensorrt_for_rtx_compiles_them(exported: Export, tmp_path: Path) -> None:
    target = find_target("tensorrt-rtx", ("SM89", "SM120"))
    for precision, attention in (("fp16", "op"), ("bf16", "op"), ("fp16", "decomposed")):
        onnx_folder = exported(precision=precision, attention=attention)
        folders = build_engines(onnx_folder, tmp_path / f"{precision}-{attention}", target)
        assert [folder.name for folder in folders] == [contract.FIELD, contract.VAE]
        field, vae = (Manifest.read(folder, hint="").tensors for folder in folders)
        length, points = contract.AXES["L"], contract.AXES["P"]
        assert field["queries"]["profile"] == [[1, 1, 3], [2, points.opt, 3], [8, points.max, 3]]
        assert field["k"]["profile"] == [[1, 2, 1, 64], [2, 2, length.opt, 64], [8, 2, length.max, 64]]
        kinds = {name: tensor["dtype"] for name, tensor in (field | vae).items()}
        assert kinds == {"queries": "FLOAT", "k": "HALF", "v": "HALF", "field": "FLOAT", "latents": "FLOAT"}


def test_a_profile_of_points(exported: Export, tmp_path: Path) -> None:
    options = EngineOptions(profile=parse_profile(["points=1..64..256", "latents=1..8..32"]))
    target = find_target("tensorrt-rtx", ("SM89",))
    field, vae = (
        Manifest.read(folder, hint="").tensors
        for folder in build_engines(exported(precision="fp16"), tmp_path, target, options)
    )
    assert field["queries"]["profile"] == [[1, 1, 3], [2, 64, 3], [8, 256, 3]]
    assert vae["latents"]["profile"] == [[1, 1, 64], [2, 8, 64], [8, 32, 64]]


def test_its_plans_are_compared_like_every_other(
    exported: Export, source: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`verify --engine` checks these plans too. Here ONNX Runtime takes the place of the GPU."""
    onnx_folder = exported(precision="fp16")
    build_engines(onnx_folder, tmp_path, find_target("tensorrt-rtx", ("SM89",)))
    monkeypatch.setattr(parity, "PlanRunner", lambda _plans, _target: OnnxRunner(onnx_folder))
    whole = parity.TorchRunner
    monkeypatch.setattr(parity, "TorchRunner", lambda network, graphs, **_: whole(network, graphs))
    results = parity.verify_engines(tmp_path, source(), onnx=onnx_folder)
    assert {check.name for check in results[contract.FIELD]} == {"field, torch", "field, ONNX Runtime"}
    assert all(check.passed for checks in results.values() for check in checks)
    assert (tmp_path / contract.VAE / parity.RECEIPT).is_file()


def test_verify_wants_the_artifacts_own_weights(exported: Export, source: Sources) -> None:
    with pytest.raises(ManifestError, match="was made from a checkpoint, which must be given, got none\nhint: --checkpoint"):
        parity.verify(exported())
    with pytest.raises(ManifestError, match="must be made from these weights, got .*\nhint: --checkpoint FILE"):
        parity.verify(exported(), source("turbo"))


def test_a_graph_that_the_network_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph must be one of vae, field, all, got 'guided'"):
        export_onnx(ShapeVAESource(preset="tiny"), tmp_path, graph="guided", options=OnnxOptions())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["hunyuan3d-export", "vae", "--preset", "tiny", "--graph", "field", "--seed", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        app.run()
    assert ended.value.code in (0, None) and str(tmp_path / contract.FIELD) in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / contract.FIELD, hint="")
    assert manifest.made_from["weights"] == {"preset": "tiny", "seed": 3, "scale_factor": 1.0, "include_pi": False}
    assert all(check.passed for check in parity.verify(tmp_path)[contract.FIELD]), "seeded weights need no file"
    monkeypatch.setattr("sys.argv", ["hunyuan3d-export", "vae", "--out", str(tmp_path), "--checkpoint", "nothing"])
    assert app.run() == 2
    assert "found nothing at nothing" in capsys.readouterr().err
