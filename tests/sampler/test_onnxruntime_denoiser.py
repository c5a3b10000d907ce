"""The CPU runtime's denoiser: requests of equal shape as one batch, each with its own error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime_denoiser import Denoiser, InvalidInput

from hunyuan3d_client import contract
from hunyuan3d_export.onnx_from_torch import MODEL_FILE
from hunyuan3d_export.parity import example_inputs, relative_l2


@pytest.fixture(scope="module")
def denoiser(artifacts: Callable[..., Path]) -> Denoiser:
    return Denoiser(artifacts() / contract.DIT_GUIDED / MODEL_FILE, threads=2)


def request(sizes: tuple[int, int, int], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors as Triton hands them over: t and the scale are [B, 1]."""
    inputs = {name: value.numpy() for name, value in example_inputs(sizes, seed=seed).items()}
    return {**inputs, "t": inputs["t"][:, None], "guidance_scale": np.linspace(1, 5, sizes[0], dtype=np.float32)[:, None]}


def test_mixed_shapes_come_back_in_order(denoiser: Denoiser) -> None:
    requests = [request(sizes, seed=i) for i, sizes in enumerate([(1, 5, 3), (2, 7, 3), (3, 5, 3), (1, 5, 4), (1, 7, 3)])]
    together = denoiser.velocity(requests)
    for tensors, found in zip(requests, together, strict=True):
        (alone,) = denoiser.velocity([tensors])
        assert found.shape == tensors["latents"].shape
        assert relative_l2(torch.from_numpy(found), torch.from_numpy(alone)) <= 1e-6


def test_flat_scalars_are_taken_too(denoiser: Denoiser) -> None:
    tensors = request((2, 5, 3))
    (expected,) = denoiser.velocity([tensors])
    (found,) = denoiser.velocity([{name: value if value.ndim > 2 else value[:, 0] for name, value in tensors.items()}])
    np.testing.assert_array_equal(found, expected)


BAD = {
    "NaN": ("latents", lambda value: value * np.nan, "latents must be finite, got NaN or Inf"),
    "Inf": ("context", lambda value: np.full_like(value, np.inf), "context must be finite, got NaN or Inf"),
    "scale": ("guidance_scale", lambda value: value * np.nan, "guidance_scale must be finite, got NaN or Inf"),
    "t above": ("t", lambda value: value * 0 + 1.5, r"t must be in \[0, 1\], got 1.5 to 1.5"),
    "t below": ("t", lambda value: value * 0 - 0.1, r"t must be in \[0, 1\], got -0.1 to -0.1"),
    "no latents": ("latents", lambda value: value[:, :0], r"latents must not be empty, got shape \[2, 0, 64\]"),
    "no context": ("context", lambda value: value[:, :0], r"context must not be empty, got shape \[2, 0, 1536\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_not_its_neighbours_error(name: str, denoiser: Denoiser) -> None:
    tensor, spoil, message = BAD[name]
    good, bad = request((1, 5, 3)), request((2, 5, 3))
    bad[tensor] = spoil(bad[tensor])
    first, error, last = denoiser.velocity([good, bad, good])
    assert isinstance(error, InvalidInput)
    with pytest.raises(InvalidInput, match=message):
        raise error
    np.testing.assert_array_equal(first, last)


def test_t_may_be_exactly_zero_and_one(denoiser: Denoiser) -> None:
    tensors = {**request((2, 5, 3)), "t": np.array([[0.0], [1.0]], np.float32)}
    (velocity,) = denoiser.velocity([tensors])
    assert np.isfinite(velocity).all()


def test_missing_graph(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="graph must be deployed, found none at .*\nhint: hunyuan3d-export deploy"):
        Denoiser(tmp_path / MODEL_FILE)
