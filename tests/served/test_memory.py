"""Ten thousand calls must not make a client grow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hunyuan3d_export.server.embedded import Endpoints

pytestmark = [pytest.mark.served, pytest.mark.slow]

# The client runs in a process of its own, because a leak would not show beside torch and the other tests.
CALLS = """
import asyncio, resource, sys
from pathlib import Path
import numpy as np
import hunyuan3d_client as h

latents, context = np.ones((1, 4, 64), np.float32), np.ones((1, int(sys.argv[2]), 1536), np.float16)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

async def main():
    async with h.AsyncClient(sys.argv[1], max_in_flight=64) as client:
        async def call(times):
            for _ in range(times):
                assert (await client.denoise(latents, 0.5, context)).shape == (1, 4, 64)
        await asyncio.gather(*(call(16) for _ in range(64)))
        before = resident()
        await asyncio.gather(*(call(157) for _ in range(64)))
        print(64 * 157, before, resident())

asyncio.run(main())
"""


@pytest.mark.parametrize("tokens", [3, 180], ids=["wire", "shared memory"])
def test_10_000_calls_64_in_flight(served: Endpoints, tokens: int) -> None:
    command = [sys.executable, "-c", CALLS, served.grpc, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    calls, before, after = map(int, done.stdout.split())
    assert calls >= 10_000 and after < 1.05 * before, f"resident bytes {before} -> {after}"
