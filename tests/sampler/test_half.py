"""The float32 twins of the unary sampler's inputs."""

from __future__ import annotations

import half
import numpy as np
import pytest

from hunyuan3d_client import contract


def test_names_are_the_contracts() -> None:
    spec = contract.MODELS[contract.SAMPLER_UNARY]
    assert half.FLOAT32_TWIN == contract.FLOAT32_TWIN and half.REQUIRED == contract.CONTEXT.name
    assert half.twins([tensor.name for tensor in spec.inputs if tensor.dtype != "FP16"]) == [
        "context_fp32",
        "negative_context_fp32",
    ]
    assert not [tensor.name for tensor in spec.inputs if not tensor.optional]
    others = [name for name in contract.MODELS if name != contract.SAMPLER_UNARY]
    assert not [tensor.name for name in others for tensor in contract.MODELS[name].inputs if "fp32" in tensor.name]


def test_cast() -> None:
    given = np.array([[0.1, 65504.0, -65519.0, np.nan, np.inf]], np.float32)
    found = half.cast({"context_fp32": given})
    assert found.keys() == {"context"} and found["context"].dtype == np.float16
    np.testing.assert_array_equal(found["context"], np.array([[0.1, 65504, -65504, np.nan, np.inf]], np.float16))
    with pytest.raises(ValueError, match="negative_context_fp32 must be within float16's range of 65504, got magnitude 65520"):
        half.cast({"negative_context_fp32": np.array([np.inf, -65520.0], np.float32)})
    assert half.cast({"context_fp32": np.zeros((0, 2, 3), np.float32)})["context"].shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["context", "context_fp32"], "context_fp32 must be left out beside context, got both"),
        (["negative_context_fp32", "steps"], "context or context_fp32 must be given, got neither"),
        (["context_fp32", "negative_context", "negative_context_fp32"], "negative_context_fp32 must be left out beside "),
    ],
    ids=" ".join,
)
def test_refused(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        half.twins(names)
