"""Shared memory with the real server: the same results, and nothing left at either side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from hunyuan3d_client import Client
from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]


def files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("hunyuan3d-client-*")}


def test_results_are_those_of_the_wire(
    served: Endpoints, raw: tritonclient.grpc.InferenceServerClient, tokens: Make, noise: Make
) -> None:
    context, latents = tokens(2, 200), noise(2, 1100)
    before = files()
    with Client(served.grpc, shared_memory=True, timeout_s=120) as shared, Client(served.grpc, shared_memory=False) as wire:
        for t in (0.25, 0.5):
            expected = wire.denoise(latents, t, context)
            np.testing.assert_allclose(shared.denoise(latents, t, context), expected, rtol=1e-4, atol=1e-5)
        options = {"num_latents": 7, "steps": 4, "negative_context": tokens(2, 200, seed=1)}
        np.testing.assert_allclose(shared.sample(context, **options), wire.sample(context, **options), rtol=1e-4, atol=1e-5)
        (mine,) = files() - before
        assert mine in raw.get_system_shared_memory_status().regions
    assert files() == before and mine not in raw.get_system_shared_memory_status().regions


def test_calls_abandoned_in_shared_memory_do_not_hurt_the_server(served: Endpoints, client: Client, tokens: Make) -> None:
    before = files()
    with Client(served.grpc, shared_memory=True, timeout_s=120) as shared:
        for seed in range(4):
            stream = shared.stream(tokens(1, 400), num_latents=8, steps=1000, seed=seed, preview_every=0)
            next(stream)
            stream.close()
        assert shared.sample(tokens(1, 400), num_latents=8, steps=3).shape == (1, 8, 64)
    assert files() == before and client.health().live


KILLED = """
import sys, numpy as np
from hunyuan3d_client import Client

client = Client(sys.argv[1], shared_memory=True)
steps = client.stream(np.ones((1, 400, 1536), np.float16), num_latents=8, steps=1000, preview_every=0)
next(steps)
print("in flight", flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_after_kill_9_and_a_restart(served: Endpoints, client: Client, tokens: Make, noise: Make) -> None:
    before = files()
    command = [sys.executable, "-c", KILLED, served.grpc]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in flight\n"
        process.kill()
    assert len(files() - before) == 1, "the killed client's"
    with Client(served.grpc, shared_memory=True, timeout_s=120) as restarted:
        restarted.denoise(noise(1, 5), 0.5, tokens(1, 400))
        assert len(files() - before) == 1, "the restarted client's own"
    assert files() == before and client.health().live
