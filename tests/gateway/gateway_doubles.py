"""A maker of meshes without a server, for tests in which the real server is not the point."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import Any

import trimesh
from PIL import Image

from hunyuan3d_client import Hunyuan3DError, Mesh
from hunyuan3d_gateway.abilities import Abilities
from hunyuan3d_gateway.board import Board
from hunyuan3d_gateway.jobs import Job

ABLE = Abilities(
    ready=True, model="shapes", random=False, meshes=True, solid=True, pictures=4, cutting=True, prompts=True, steps=50, capacity=2
)  # fmt: skip


def mesh_of(seed: int, format: str = "glb") -> Mesh:
    """A box whose size tells the seed."""
    box = trimesh.creation.box((1 + seed % 97 / 100, 1, 1))
    data = box.export(file_type=format)
    facts = {"vertices": len(box.vertices), "faces": len(box.faces), "watertight": True}
    return Mesh(data if isinstance(data, bytes) else data.encode(), format, facts)


def picture(color: str = "orange", size: tuple[int, int] = (64, 48), format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file."""
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, format=format, **options)
    return out.getvalue()


class FakeServers:
    """Servers that can do what a test says."""

    def __init__(self, able: Abilities = ABLE) -> None:
        self.able = able

    async def abilities(self) -> Abilities:
        return self.able


class FakeMaker:
    """Makes boxes. Jobs wait while `gate` is closed; `errors` are raised first, one for each attempt."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.board: Board | None = None
        self.errors: list[Hunyuan3DError] = []
        self.begun: list[str] = []
        self.order: list[str] = []
        self.cancelled: list[str] = []

    async def make(self, job: Job, pictures: Sequence[bytes]) -> Mesh:
        self.begun.append(job.id)
        self.order.append(job.caller)
        assert all(data.startswith(b"\x89PNG") for data in pictures)
        if self.board is not None:
            self.board.update(job.id, stage="sampling", step=1, total=2, share=0.5)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(job.id)
            raise
        if self.errors:
            raise self.errors.pop(0)
        return mesh_of(int(job.options.get("seed", 0)), job.format)
