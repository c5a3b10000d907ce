"""Callers without the client: plain JSON, and the block of docs/http.md, over Triton's HTTP."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from hunyuan3d_client import Client, contract
from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served

WAIT_S = 60.0
OPTIONS = {"steps": 3, "num_latents": 5, "seed": 4}
Tokens = Callable[..., np.ndarray]


def plain(name: str, array: np.ndarray, datatype: str) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.tolist()}


def post(endpoints: Endpoints, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The answer of the unary sampler to plain JSON. Raises ValueError with its words for status 400."""
    types = {spec.name: spec.dtype for spec in contract.MODELS[contract.SAMPLER_UNARY].inputs}
    tensors = {**tensors, **{name: np.array([value]) for name, value in OPTIONS.items()}}
    body = {"inputs": [plain(name, array, types.get(name, "FP32")) for name, array in tensors.items()]}
    url = f"http://{endpoints.http}/v2/models/{contract.SAMPLER_UNARY}/infer"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=WAIT_S) as answer:
            outputs = json.load(answer)["outputs"]
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == 400
            raise ValueError(json.load(error)["error"]) from error
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in outputs}


def test_json_gives_what_the_client_gets(served: Endpoints, client: Client, tokens: Tokens) -> None:
    context, negative = tokens(1, 4), tokens(1, 4, seed=1)
    expected = client.sample(context, **OPTIONS)
    found = post(served, {"context_fp32": context})
    assert found["path"].tolist() == ["guided"]
    np.testing.assert_array_equal(found["latents"].astype(np.float32), expected)
    np.testing.assert_array_equal(post(served, {"context_fp32": context.astype(np.float32) * 1.0001})["latents"], expected)
    both = post(served, {"context_fp32": context, "negative_context_fp32": negative})["latents"].astype(np.float32)
    np.testing.assert_array_equal(both, client.sample(context, negative_context=negative, **OPTIONS))
    assert not np.array_equal(both, expected)


def test_one_input_in_each_type(served: Endpoints, client: Client, tokens: Tokens) -> None:
    """A caller over gRPC may still send float16, and mix both types."""
    context, negative = tokens(1, 4), tokens(1, 4, seed=1)
    arrays = {"context": (context, "FP16"), "negative_context_fp32": (negative.astype(np.float32), "FP32")}
    arrays |= {name: (np.array([n], np.int64 if name == "seed" else np.int32), "INT32") for name, n in OPTIONS.items()}
    inputs = []
    for name, (array, datatype) in arrays.items():
        made = triton.InferInput(name, list(array.shape), "INT64" if name == "seed" else datatype)
        inputs.append(made.set_data_from_numpy(array))
    with triton.InferenceServerClient(served.grpc) as raw:
        found = raw.infer(contract.SAMPLER_UNARY, inputs, client_timeout=WAIT_S).as_numpy("latents")
    np.testing.assert_array_equal(found, client.sample(context, negative_context=negative, **OPTIONS))


def test_what_is_refused(served: Endpoints, tokens: Tokens) -> None:
    huge = np.full((1, 2, 1536), 70000.0)
    for tensors, words in (
        ({}, "context or context_fp32 must be given, got neither"),
        ({"negative_context_fp32": tokens(1, 2)}, "context or context_fp32 must be given, got neither"),
        ({"context_fp32": huge}, "context_fp32 must be within float16's range of 65504, got magnitude 70000"),
        ({"context_fp32": tokens(1, 2), "negative_context_fp32": tokens(1, 3)}, "negative_context must have context's shape"),
        ({"context_fp32": np.zeros((1, 2, 1535))}, "context_fp32"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            post(served, tensors)


def test_the_block_of_the_document(served: Endpoints, client: Client, root: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "http.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len([line for line in block.splitlines() if line]) == 8, "eight lines, of the standard library alone"
    assert re.findall(r"^(?:import|from) (.*)$", block, re.MULTILINE) == ["json, struct, urllib.request"]
    namespace: dict[str, Any] = {}
    exec(compile(block.replace("localhost:8000", served.http), "docs/http.md", "exec"), namespace)
    context = np.arange(1536, dtype=np.float16)[None, None]
    found = np.array(namespace["latents"], np.float32).reshape(1, 128, 64)
    np.testing.assert_array_equal(found, client.sample(context, steps=10, num_latents=128))
