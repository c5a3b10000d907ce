"""Requests of equal shapes are evaluated together, and each gets its own result or its own error, whatever the runtime."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batching import Inputs, InvalidInput
from batching import evaluate as evaluate_together
from finite import all_finite
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

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
def test_one_evaluation_for_each_shape(sizes: list[tuple[int, int, int]], library: Any) -> None:
    inputs = Inputs([{"name": "latents"}, {"name": "t", "reshape": {"shape": []}}, {"name": "context"}], "", {}, library)
    requests = [
        inputs.prepare(
            {
                "latents": library.full((batch, length, 64), float(index)),
                "t": library.full((batch, 1), 0.5),
                "context": library.ones((batch, tokens, 1536)),
            }
        )
        for index, (batch, length, tokens) in enumerate(sizes)
    ]
    calls = []

    def run(tensors: dict) -> dict[str, Any]:
        calls.append(tensors["latents"].shape[0])
        assert tensors["t"].shape == (tensors["latents"].shape[0],)
        return {"velocity": tensors["latents"], "time": tensors["t"] + tensors["latents"][:, 0, 0]}

    results = evaluate_together(requests, run, library)
    for index, (result, (batch, length, _)) in enumerate(zip(results, sizes, strict=True)):
        assert tuple(result["velocity"].shape) == (batch, length, 64) and (result["velocity"] == index).all()
        assert tuple(result["time"].shape) == (batch,) and (result["time"] == index + 0.5).all()
    assert len(calls) == len({shape[1:] for shape in sizes}) and sum(calls) == sum(batch for batch, _, _ in sizes)


def test_a_lone_request_is_not_copied() -> None:
    request, seen = {"x": np.ones((2, 3)), "y": np.ones(2)}, []

    def run(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(tensors)
        return {"z": tensors["x"]}

    evaluate_together([request], run, np)
    assert all(seen[0][name] is request[name] for name in request)


def test_a_failing_evaluation_ends_the_requests_that_share_it_and_no_others() -> None:
    def run(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if tensors["x"].shape[1] == 6:
            raise RuntimeError("out of memory")
        return {"y": tensors["x"] * 2}

    requests = [{"x": np.full((1, length), index)} for index, length in enumerate([5, 6, 5, 6, 7])]
    found = evaluate_together(requests, run, np)
    assert [str(result) if isinstance(result, Exception) else float(result["y"][0, 0]) for result in found] == [
        0.0,
        "out of memory",
        4.0,
        "out of memory",
        8.0,
    ]


def test_outputs_of_too_few_rows_go_to_no_request() -> None:
    requests = [{"x": np.ones((2, 3))}, {"x": np.ones((1, 3))}]
    found = evaluate_together(requests, lambda tensors: {"y": tensors["x"][:2]}, np)
    assert [str(error) for error in found] == ["y must have 3 rows, got 2"] * 2
    assert not any(isinstance(error, InvalidInput) for error in found), "the server is to blame"


VIEWS = [{"name": "pixels"}]


@pytest.mark.parametrize(
    ("limits", "fixed_sizes", "shape", "message"),
    [
        ("pixels[1] in 1..4 views", {}, (1, 5, 3), "pixels must be of 1 to 4 views, got shape [1, 5, 3]"),
        ("pixels[1] in 1..4 views", {}, (0, 1, 3), "pixels must be of 1 to 4 views, got shape [0, 1, 3]"),
        ("pixels[1] in 1..4 views", {"pixels": {1: 1}}, (1, 2, 3), "pixels must be of 1 to 1 views, got shape [1, 2, 3]"),
        ("pixels[1] in 1..4", {}, (1, 5, 3), "pixels must have size 1 to 4 on axis 1, got shape [1, 5, 3]"),
        ("", {"pixels": {2: 3}}, (1, 5, 4), "pixels must have size 3 on axis 2, got shape [1, 5, 4]"),
        ("", {"pixels": {2: 3}}, (1, 5), "pixels must have size 3 on axis 2, got shape [1, 5]"),
        ("pixels in -1.5..2", {}, (1, 2, 3), "pixels must be in [-1.5, 2], got 7 to 7"),
        ("pixels in 0..1; pixels[1] in 2..3", {}, (1, 2, 3), "pixels must be in [0, 1], got 7 to 7"),
        ("", {}, (1, 0, 3), "pixels must not be empty, got shape [1, 0, 3]"),
    ],
)
def test_limits(limits: str, fixed_sizes: dict[str, dict[int, int]], shape: tuple[int, ...], message: str) -> None:
    inputs = Inputs(VIEWS, limits, fixed_sizes, np)
    with pytest.raises(InvalidInput) as caught:
        inputs.prepare({"pixels": np.full(shape, 7, np.float32)})
    assert str(caught.value) == message


def test_within_the_limits() -> None:
    inputs = Inputs(VIEWS, " pixels in 0..7 ;pixels[1] in 1..4 views; ", {"pixels": {2: 3}}, np)
    for views in (1, 4):
        for value in (0, 7):
            assert inputs.prepare({"pixels": np.full((2, views, 3), value, np.float32)})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("pixels", "limits must be entries like 't in 0..1' or 'pixels[1] in 1..4 views', got 'pixels'"),
        ("pixels in 0.5", "got 'pixels in 0.5'"),
        ("pixels in 0..1, pixels in 0..1", "got 'pixels in 0..1, pixels in 0..1'"),
        ("pixels[V] in 0..1", "got 'pixels[V] in 0..1'"),
        ("t in 0..1", "limits must be of the inputs pixels, got 't'"),
        ("pixels in 2..1", "limits must be LOW..HIGH, got 'pixels in 2..1'"),
    ],
)
def test_wrong_limits(limits: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Inputs(VIEWS, limits, {}, np)


@pytest.mark.parametrize("value", [np.nan, np.inf, 9.0])
def test_values_that_the_caller_has_checked_are_not_looked_at_again(value: float) -> None:
    inputs = Inputs(VIEWS, "pixels in 0..1; pixels[1] in 1..4 views", {}, np)
    tensors = {"pixels": np.full((1, 2), value, np.float16)}
    with pytest.raises(InvalidInput):
        inputs.prepare(tensors)
    assert inputs.prepare(tensors, check_values=False)["pixels"] is tensors["pixels"]
    with pytest.raises(InvalidInput, match="pixels must be of 1 to 4 views"):
        inputs.prepare({"pixels": np.full((1, 5), value, np.float16)}, check_values=False)


@settings(deadline=None, max_examples=200)
@given(arrays.arrays(np.float16, (1, 2, 3), elements=st.floats(width=16)))
def test_finite_by_bits_is_numpys(value: np.ndarray) -> None:
    assert all_finite(value) == all_finite(torch.from_numpy(value), torch) == np.isfinite(value).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_bad_value_is_found(dtype: type, bad: float) -> None:
    value = np.full((2, 3), np.finfo(dtype).min, dtype)
    assert all_finite(value) and all_finite(torch.from_numpy(value), torch)
    value[1, 2] = bad
    assert not all_finite(value) and not all_finite(torch.from_numpy(value), torch)
