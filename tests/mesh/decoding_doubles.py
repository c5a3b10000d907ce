"""Stand-ins for the driver's neighbours: networks whose field is a formula, and a sink that records progress."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import numpy as np
from decoding import Decoder, MeshFile, Progress
from mesh_request import MeshRequest
from mesh_settings import MeshSettings
from parameters import parse

PARAMETERS = {
    "resolution": "24",
    "format": "ply",
    "max_faces": "0",
    "keep": "0.005",
    "level": "0",
    "method": "follow",
    "max_evaluations": "1000000",
    "max_decodes": "2",
    "max_queued": "1",
    "field_calls": "3",
    "field_calls_per_decode": "2",
    "queue_timeout_s": "60",
    "total_timeout_s": "600",
    "evaluation_timeout_s": "30",
}
LATENTS = np.zeros((1, 5, 64), np.float32)
Field = Callable[[np.ndarray], np.ndarray]


def sphere(points: np.ndarray, radius: float = 0.7) -> np.ndarray:
    return np.clip(4 * (radius - np.linalg.norm(points, axis=-1)), -1, 1).astype(np.float32)


def settings(**limits: object) -> MeshSettings:
    return dataclasses.replace(parse(MeshSettings, PARAMETERS), **limits)


class FieldNetworks:
    """Networks whose field is `field`. `sizes` are the points of each call, `at[n]` runs in the n-th call of the field."""

    def __init__(self, field: Field = sphere) -> None:
        self.field_of = field
        self.sizes: list[int] = []
        self.request_ids: list[str] = []
        self.running = self.most_running = 0
        self.at: dict[int, Callable[[], None]] = {}

    async def keys_values(self, latents: np.ndarray, request_id: str) -> str:
        assert latents.shape == LATENTS.shape
        return f"keys and values of {request_id}"

    async def field(self, queries: np.ndarray, keys_values: str, request_id: str) -> np.ndarray:
        assert keys_values == f"keys and values of {request_id}" and queries.dtype == np.float32
        self.sizes.append(len(queries))
        number = len(self.sizes)
        self.request_ids.append(request_id)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            self.at.pop(number, lambda: None)()
            return self.field_of(queries)
        finally:
            self.running -= 1


class Recorder:
    """A sink that records progress, and an observer that counts."""

    def __init__(self, request_id: str = "a") -> None:
        self.request_id = request_id
        self.stages: list[Progress] = []
        self.points = self.waves = 0

    def progress(self, progress: Progress) -> None:
        self.stages.append(progress)

    def evaluated(self, points: int) -> None:
        self.points += points

    def waved(self) -> None:
        self.waves += 1


def decoded(
    networks: FieldNetworks,
    *,
    check: Callable[[], None] = lambda: None,
    sink: Recorder | None = None,
    request: MeshRequest | None = None,
    **limits: object,
) -> MeshFile:
    """One decode in an event loop of its own."""
    sink = sink or Recorder()
    chosen = settings(**limits)

    async def main() -> MeshFile:
        decoder = Decoder(networks, chosen, sink)
        return await decoder.decode(LATENTS, request or chosen.defaults, sink, check)

    return asyncio.run(main())
