"""The served network as Triton's Python backend calls it: names from the config, and an error for each request that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import triton_python_backend_utils as pb_utils
from model_code import load_model

# k = x scale and v = -x. The reshape fails where L is more than 12, so that an evaluation can fail half-way.
GRAPH = """
    <ir_version: 10, opset_import: ["": 20]>
    two (float[B, L, 1] x, float[B] scale) => (float[B, L, 1] k, float[B, L, 1] v)
    {
        axes = Constant <value_ints: ints = [1, 2]> ()
        column = Unsqueeze (scale, axes)
        k = Mul (x, column)
        length = Shape <start: int = 1, end: int = 2> (x)
        twelve = Constant <value_ints: ints = [12]> ()
        most = Min (length, twelve)
        rows = Shape <start: int = 0, end: int = 1> (x)
        last = Constant <value_ints: ints = [1]> ()
        target = Concat <axis: int = 0> (rows, most, last)
        negative = Neg (x)
        v = Reshape (negative, target)
    }
"""
PARAMETERS = {
    "runtime": "onnxruntime",
    "model_file": "model.onnx",
    "threads": "1",
    "limits": "scale in 0..10; x[1] in 1..99 rows",
}
CONFIG = {
    "input": [{"name": "x", "dims": [-1, 1]}, {"name": "scale", "dims": [1], "reshape": {"shape": []}}],
    "output": [{"name": "k"}, {"name": "v"}],
}


def arguments(folder: Path, **changes: str | None) -> dict[str, str]:
    """What Triton hands to `initialize`, with some parameters changed, or left out where the change is None."""
    texts = {name: text for name, text in {**PARAMETERS, **changes}.items() if text is not None}
    config = {**CONFIG, "parameters": {name: {"string_value": text} for name, text in texts.items()}}
    return {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1").mkdir()
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "1" / "model.onnx")
    return tmp_path


@pytest.fixture(params=["hunyuan3d_dit", "hunyuan3d_dit_guided", "hunyuan3d_conditioner"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    """Each model that serves a network, here with a graph that none of them knows."""
    served = load_model(request.param).TritonPythonModel()
    served.initialize(arguments(folder, FORCE_CPU_ONLY_INPUT_TENSORS="no", needs="another_model"))
    pb_utils.Logger.lines.clear()
    return served


def request_of(rows: int, length: int, *, scale: float = 2, fill: float = 1, parameters: str = "") -> pb_utils.Request:
    x = np.full((rows, length, 1), fill, np.float32)
    return pb_utils.Request({"x": x, "scale": np.full((rows, 1), scale, np.float32)}, parameters=parameters)


def test_each_request_gets_its_rows_of_every_output(model: Any) -> None:
    responses = model.execute([request_of(1, 5), request_of(2, 5, scale=3, fill=4), request_of(1, 7, fill=9)])
    found = [{name: (array.shape, float(array[0, 0, 0])) for name, array in response.arrays.items()} for response in responses]
    assert found == [
        {"k": ((1, 5, 1), 2.0), "v": ((1, 5, 1), -1.0)},
        {"k": ((2, 5, 1), 12.0), "v": ((2, 5, 1), -4.0)},
        {"k": ((1, 7, 1), 18.0), "v": ((1, 7, 1), -9.0)},
    ]


def test_each_failure_is_the_error_of_its_own_request(model: Any) -> None:
    bad = [
        request_of(1, 5, fill=np.nan),
        request_of(1, 5, scale=11),
        request_of(1, 100),
        request_of(1, 13),  # within the limits, but the graph's reshape fails
        pb_utils.Request({"x": np.ones((1, 5, 1), np.float32)}),
    ]
    first, *failed, last = model.execute([request_of(1, 5), *bad, request_of(1, 5)])
    for response in (first, last):
        np.testing.assert_array_equal(response.arrays["v"], -np.ones((1, 5, 1), np.float32))
    errors = [(response.error().code(), response.error().message()) for response in failed]
    assert errors[:3] == [
        ("INVALID_ARG", "x must be finite, got NaN or Inf"),
        ("INVALID_ARG", "scale must be in [0, 10], got 11 to 11"),
        ("INVALID_ARG", "x must be of 1 to 99 rows, got shape [1, 100, 1]"),
    ]
    assert [code for code, _ in errors[3:]] == ["INTERNAL", "INTERNAL"] and "Reshape" in errors[3][1]
    assert len(pb_utils.Logger.lines) == 5 and all("'an-id' failed" in line for line in pb_utils.Logger.lines)


@pytest.mark.parametrize(
    ("parameters", "is_refused"),
    [("", True), ("{}", True), ('{"checked": false}', True), ('{"checked": "true"}', True), ('{"checked": true}', False)],
)
def test_only_the_samplers_word_skips_the_checks_of_values(parameters: str, is_refused: bool, model: Any) -> None:
    (response,) = model.execute([request_of(1, 5, scale=11, parameters=parameters)])
    assert response.has_error() == is_refused
    (response,) = model.execute([request_of(1, 100, parameters=parameters)])
    assert response.has_error(), "sizes are always checked"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"runtime": "abacus"},
            pb_utils.TritonModelException,
            "runtime must be one of onnxruntime, torch, tensorrt_rtx, got 'abacus'",
        ),
        ({"limits": None}, ValueError, "parameters must be runtime, model_file, limits, got model_file, runtime, threads"),
        ({"threads": None}, ValueError, "parameters must be threads, got none"),
        ({"colour": "red"}, ValueError, "parameters must be threads, got colour, threads"),
        ({"limits": "y in 0..1"}, ValueError, "limits must be of the inputs x, scale, got 'y'"),
        ({"model_file": "other.onnx"}, FileNotFoundError, "graph must be deployed, found none at .*other.onnx"),
    ],
)
def test_wrong_configs(changes: dict[str, str | None], error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        load_model("hunyuan3d_dit").TritonPythonModel().initialize(arguments(folder, **changes))


@pytest.mark.parametrize(
    ("runtime", "module", "package", "extra"),
    [("torch", "torch_network", "torch", "export"), ("tensorrt_rtx", "rtx_plan", "tensorrt_rtx_bindings", "rtx")],
)
def test_a_runtime_without_its_packages(
    runtime: str, module: str, package: str, extra: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"runtime {runtime} must have its packages .*, missing {package}\nhint: .*pip install '\.\[{extra}\]'"
    with pytest.raises(pb_utils.TritonModelException, match=message):
        load_model("hunyuan3d_dit").TritonPythonModel().initialize(arguments(folder, runtime=runtime))
