"""Requests of equal shape as one batch, each with its own error, whatever runtime evaluates them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from batching import InvalidInput, velocities
from hypothesis import given
from hypothesis import strategies as st

from hunyuan3d_export.checks import relative_l2

Make = Callable[..., dict[str, np.ndarray]]
Evaluate = Callable[..., list]


def test_mixed_shapes_come_back_in_order(evaluate: Evaluate, request_of: Make) -> None:
    requests = [request_of(sizes, seed=i) for i, sizes in enumerate([(1, 5, 3), (2, 7, 3), (3, 5, 3), (1, 5, 4), (1, 7, 3)])]
    together = evaluate(requests)
    for tensors, found in zip(requests, together, strict=True):
        (alone,) = evaluate([tensors])
        assert found.shape == tensors["latents"].shape and found.dtype == np.float32
        assert relative_l2(torch.from_numpy(found), torch.from_numpy(alone)) <= 1e-6


def test_flat_scalars_are_taken_too(evaluate: Evaluate, request_of: Make) -> None:
    tensors = request_of((2, 5, 3))
    (expected,) = evaluate([tensors])
    (found,) = evaluate([{name: value if value.ndim > 2 else value[:, 0] for name, value in tensors.items()}])
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
def test_a_bad_request_is_not_its_neighbours_error(name: str, evaluate: Evaluate, request_of: Make) -> None:
    tensor, spoil, message = BAD[name]
    good, bad = request_of((1, 5, 3)), request_of((2, 5, 3))
    bad[tensor] = spoil(bad[tensor])
    first, error, last = evaluate([good, bad, good])
    assert isinstance(error, InvalidInput)
    with pytest.raises(InvalidInput, match=message):
        raise error
    assert relative_l2(torch.from_numpy(first), torch.from_numpy(last)) <= 1e-6


def test_t_may_be_exactly_zero_and_one(evaluate: Evaluate, request_of: Make) -> None:
    (velocity,) = evaluate([{**request_of((2, 5, 3)), "t": np.array([[0.0], [1.0]], np.float32)}])
    assert np.isfinite(velocity).all()


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)), max_size=8), st.sampled_from([np, torch]))
def test_one_evaluation_for_each_shape(sizes: list[tuple[int, int, int]], library: object) -> None:
    requests = [
        {
            "latents": library.full((batch, length, 64), float(index)),
            "t": library.full((batch, 1), 0.5),
            "context": library.ones((batch, tokens, 1536)),
        }
        for index, (batch, length, tokens) in enumerate(sizes)
    ]
    calls = []

    def evaluate(tensors: dict) -> object:
        calls.append(tensors["latents"].shape[0])
        assert tensors["t"].shape == (tensors["latents"].shape[0],)
        return tensors["latents"]

    results = velocities(requests, evaluate, library)
    for index, (result, (batch, length, _)) in enumerate(zip(results, sizes, strict=True)):
        assert tuple(result.shape) == (batch, length, 64) and (result == index).all()
    assert len(calls) == len({shape[1:] for shape in sizes}) and sum(calls) == sum(batch for batch, _, _ in sizes)
