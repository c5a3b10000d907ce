"""The states of samples are NumPy arrays, or on a GPU CuPy arrays, with which the same stepper runs."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from arrays import Arrays
from doubles import Denoiser, expected, make_stepper, run_together
from trajectory import SampleRequest

Make = Callable[..., SampleRequest]


def test_on_a_cpu_nothing_is_copied(request_for: Make) -> None:
    triton = SimpleNamespace(Tensor=lambda name, array: (name, array))
    arrays, request = Arrays("numpy", triton), request_for()
    assert not arrays.on_gpu and arrays.upload(request) is request and arrays.call_options() == {}
    assert arrays.host(request.latents) is request.latents
    assert arrays.tensor("context", request.context) == ("context", request.context)
    assert arrays.array(SimpleNamespace(as_numpy=lambda: request.latents)) is request.latents


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed: auto may find a GPU")
def test_auto_without_cupy_is_numpy() -> None:
    assert not Arrays("auto", SimpleNamespace()).on_gpu


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["plain", "guided", "two-batch"])
def test_states_stay_on_the_gpu(path: str, request_for: Make) -> None:
    cupy = pytest.importorskip("cupy", reason="states live on a GPU only where CuPy is installed")
    arrays = Arrays("auto", SimpleNamespace())
    assert arrays.on_gpu
    requests = [request_for(batch=2, steps=5), request_for(batch=3, steps=4, seed=3)]
    uploaded = [arrays.upload(request) for request in requests]
    denoiser = Denoiser()
    seen: set[type] = set()
    denoiser.bad = lambda tensors: seen.update(type(value) for value in tensors.values())
    for request, sink in zip(
        requests, asyncio.run(run_together(make_stepper(denoiser, max_batch=4), uploaded, path)), strict=True
    ):
        assert isinstance(sink.final, cupy.ndarray)
        np.testing.assert_allclose(arrays.host(sink.final), expected(request), rtol=1e-4, atol=1e-5)
    assert seen == {cupy.ndarray}
