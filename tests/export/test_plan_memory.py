"""The device memory of a plan: measured where it loads, else estimated from the graph's shapes and called an estimate."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from hunyuan3d_client import contract
from hunyuan3d_export.commands.app import app
from hunyuan3d_export.engines import runtime
from hunyuan3d_export.engines.memory import PlanMemory, estimated, plan_memory
from hunyuan3d_export.engines.runtime import LoadedEngine, PlanLoadError
from hunyuan3d_export.manifest import Manifest

SIZES = {"B": 2, "L": 10}


def graph(path: Path, nodes: list[tuple[str, list[str], str]], shapes: dict[str, list[str | int]]) -> Path:
    """A graph of FP16 tensors. nodes: (operator, inputs, output)."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in shapes.items()}
    made = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes]
    ends = ([values.pop("x")], [values.pop("y")])
    onnx.save(helper.make_model(helper.make_graph(made, "graph", *ends, value_info=[*values.values()])), path)
    return path


def test_the_estimate_is_the_most_that_is_alive_at_once(tmp_path: Path) -> None:
    """a and b are alive together; c shares a's memory, which therefore lives until c is read; y follows when b has gone."""
    nodes = [("Relu", ["x"], "a"), ("Reshape", ["a", "s"], "c"), ("Relu", ["x"], "b"), ("Relu", ["b"], "d")]
    nodes += [("Add", ["c", "d"], "y")]
    shapes: dict[str, list[str | int]] = {
        "x": ["B", "L"], "a": ["B", "2*L + 1"], "c": ["B", "2*L + 1"], "b": ["B", "L"], "d": ["B", "L"], "y": ["B", "L"],
    }  # fmt: skip
    a, b = 2 * 21 * 2, 2 * 10 * 2
    assert estimated(graph(tmp_path / "model.onnx", nodes, shapes), SIZES) == a + 2 * b


@pytest.mark.parametrize("dim", ["N", "Mod(L, 2)", "L**2"])
def test_an_unknown_dimension_is_no_guess(dim: str, tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", [("Relu", ["x"], "a"), ("Relu", ["a"], "y")], {"x": ["B"], "a": [dim], "y": ["B"]})
    with pytest.raises(ValueError, match="a dimension must be a sum or product of B, L, got"):
        estimated(path, SIZES)
    memory = plan_memory(tmp_path / "model.plan", path, SIZES, None)
    assert memory.activation_bytes is None and "activations at the profile's largest sizes unknown" in str(memory)


def test_activations_grow_with_the_profile_and_weights_do_not(artifacts: Callable[..., Path]) -> None:
    folder = artifacts(precision="fp16") / contract.DIT_GUIDED
    small, large = (
        plan_memory(folder / "no.plan", folder / "model.onnx", {"B": rows, "L": 3072, "T": 1370}, None) for rows in (1, 8)
    )
    assert small.weights_bytes == large.weights_bytes == sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    assert small.activation_bytes and large.activation_bytes
    # The mask of the null tokens has no batch axis.
    assert 4 < large.activation_bytes / small.activation_bytes <= 8
    tokens, width = 8 * (2 * 3072 + 1370), 128
    # A single block holds at least its input, Q, K, V and the MLP's hidden layer: 8 widths of each token.
    assert 8 < large.activation_bytes / (tokens * width * 2) < 20


def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, artifacts: Callable[..., Path]) -> None:
    path = artifacts(precision="fp16") / contract.DIT / "model.onnx"
    engine: Any = types.SimpleNamespace(device_memory_size_v2=3 << 30)
    monkeypatch.setattr(runtime, "load_engine", lambda _plan, _trt: LoadedEngine(None, engine))  # type: ignore[arg-type]
    library: Any = types.ModuleType("tensorrt")
    memory = plan_memory(path, path, SIZES, library)
    assert memory.measured and "activations at the profile's largest sizes 3.00 GiB (as TensorRT says)" in str(memory)

    def refuse(*_: object) -> None:
        raise PlanLoadError("no driver")

    monkeypatch.setattr(runtime, "load_engine", refuse)
    assert not plan_memory(path, path, {"B": 1, "L": 2, "T": 3}, library).measured


def test_engine_and_info_print_it(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    runner, onnx_folder = CliRunner(), artifacts(precision="fp16")
    options = ["--target", "tensorrt-rtx", "--compute-capability", "SM89", "--onnx", str(onnx_folder), "--out", str(tmp_path)]
    built = runner.invoke(app, ["engine", *options])
    assert built.exit_code == 0, built.output
    folder = tmp_path / contract.DIT
    said = str(PlanMemory(**Manifest.read(folder, hint="").memory))
    assert said.startswith("device memory: weights ") and said.endswith("(an estimate from the graph's shapes)")
    for output in (built.output, runner.invoke(app, ["info", str(folder)]).output):
        assert said in output
