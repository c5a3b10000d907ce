"""Jobs through the gateway against the same work through the client alone, on one server: what the gateway costs.

    python bench/gateway.py --url localhost:8001 --jobs 200

Both sides make the same meshes of prompts (a server of `shapes`) with as many at a time as keep the server busy. The two take turns in
rounds, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from hunyuan3d_client import AsyncClient, Mesh
from hunyuan3d_client.shapes import embed_prompt
from hunyuan3d_gateway.gateway import Gateway
from hunyuan3d_gateway.jobs import State, Wanted
from hunyuan3d_gateway.service import Caller, Service
from hunyuan3d_gateway.settings import Settings

PROMPTS = ("torus", "cone", "two flat tori", "helix", "tall cylinder", "cube")
CALLER = Caller("address:bench")


async def through_client(client: AsyncClient, jobs: int, at_a_time: int, steps: int, resolution: int) -> float:
    """Seconds for so many meshes."""
    room = asyncio.Semaphore(at_a_time)

    async def one(index: int) -> Mesh:
        async with room:
            latents = await client.sample(embed_prompt(PROMPTS[index % len(PROMPTS)]), seed=index, steps=steps, timeout_s=3600)
            return await client.decode(latents, resolution=resolution, format="glb", timeout_s=3600)

    start = time.monotonic()
    await asyncio.gather(*map(one, range(jobs)))
    return time.monotonic() - start


async def through_gateway(service: Service, jobs: int, steps: int, resolution: int) -> float:
    """Seconds for so many jobs, from the first submission to the last end."""
    start = time.monotonic()

    async def one(index: int) -> None:
        options = {"seed": index, "steps": steps, "resolution": resolution}
        wanted = Wanted(interface="meshes", prompt=PROMPTS[index % len(PROMPTS)], options=options)
        job = await service.submit(wanted, CALLER)
        assert (await service.wait(job.id, CALLER)).state is State.COMPLETED

    await asyncio.gather(*map(one, range(jobs)))
    return time.monotonic() - start


async def run(url: str, jobs: int, rounds: int, steps: int, resolution: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(servers=url, data=Path(folder), max_queued=jobs + 1, max_queued_per_caller=jobs + 1, previews=0)
        gateway = Gateway(settings)
        async with gateway.running() as service, AsyncClient(url, max_in_flight=256) as client:
            at_a_time = (await service.abilities()).capacity
            ratios = []
            for _ in range(rounds):
                part = max(1, jobs // rounds)
                alone = await through_client(client, part, at_a_time, steps, resolution)
                behind = await through_gateway(service, part, steps, resolution)
                ratios.append(alone / behind)
    return {
        "jobs": jobs,
        "at_a_time": at_a_time,
        "throughput_of_gateway_to_client": round(statistics.median(ratios), 3),
        "rounds": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of a server of `shapes` with a shape decoder")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=64)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(run(given.url, given.jobs, given.rounds, given.steps, given.resolution))))  # noqa: T201


if __name__ == "__main__":
    main()
