"""The gate's samples through a server: in requests of as many samples as the server takes, and in their order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from hunyuan3d_client import Client, MockTransport, ModelInfo, Request, contract
from hunyuan3d_client.transport import Tensors
from hunyuan3d_export.shapes.served import served_sampler


def echo(request: Request) -> Iterable[Tensors]:
    """The last step of a sample that keeps its noise."""
    counts = {name: np.ones(1, np.int32) for name in ("step", "total", "batch")}
    return [
        {
            **counts,
            "t": np.ones(1, np.float32),
            "path": np.array([b"plain"], np.object_),
            "latents": request.inputs["latents"],
        }
    ]


@pytest.mark.parametrize(("parameters", "sizes"), [({"largest_request": "3"}, [1, 3, 3, 3]), ({}, [2, 8])])
def test_requests_are_no_larger_than_the_server_takes(parameters: dict[str, str], sizes: list[int]) -> None:
    transport = MockTransport(echo)
    sampler = transport.models[contract.SAMPLER]
    transport.models[contract.SAMPLER] = ModelInfo(sampler.name, "1", inputs=sampler.inputs, parameters=parameters)
    latents = np.random.default_rng(0).standard_normal((10, 4, 64)).astype(np.float32)
    with Client(transport=transport) as client:
        found = served_sampler(client)(np.zeros((10, 3, 1536), np.float16), latents, 1.0)
    np.testing.assert_array_equal(found, latents)
    sent = [len(request.inputs["latents"]) for request in transport.requests if request.model == contract.SAMPLER]
    assert sorted(sent) == sizes
