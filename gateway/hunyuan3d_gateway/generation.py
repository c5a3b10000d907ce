"""One job through the client: from a picture or a prompt to a mesh, with progress and previews on the way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hunyuan3d_client import AsyncClient, Hunyuan3DError, Mesh, MeshProgress, Step, noise
from hunyuan3d_client.options import DecodeOptions, SampleOptions, options_of
from hunyuan3d_client.shapes import embed_prompt

from . import points, previews
from .board import Board
from .jobs import Job
from .pace import Pace

_SAMPLED = 0.75  # the share of a job that sampling stands for in its bar, where the pace is not known
_ENCODED = 0.03
_USUAL_RESOLUTION = 256
_MESHING = {option.name for option in options_of(DecodeOptions)}
_SAMPLING = {option.name for option in options_of(SampleOptions)}

logger = logging.getLogger(__name__)


class Maker(Protocol):
    """What makes the mesh of a job. Tests have one without a server."""

    async def make(self, job: Job, pictures: Sequence[bytes]) -> Mesh: ...


class Generation:
    """Runs jobs on the servers of a client and puts their progress on the board.

    previews: how many each job gets. pointed: whether latents are points, so that previews cost nothing. solid: whether the
    servers decode meshes; without, the mesh of points is one of small octahedra.
    """

    def __init__(self, client: AsyncClient, board: Board, pace: Pace, *, previews: int, preview_resolution: int) -> None:
        self._client = client
        self._board = board
        self._pace = pace
        self._previews = previews
        self._preview_resolution = preview_resolution
        self._previewing: set[str] = set()
        self.pointed = False
        self.solid = True
        self.usual_steps = 50
        self.timeout_s = 1800.0

    async def make(self, job: Job, pictures: Sequence[bytes]) -> Mesh:
        """The mesh of a job. Raises Hunyuan3DError. Cancelling stops the work on the server within one step."""
        options = {**job.options, "format": job.format, "request_id": job.id, "timeout_s": self.timeout_s}
        every = 0 if not self._previews else max(1, (job.options.get("steps") or self.usual_steps) // self._previews)
        follow = _Follow(self, job, started=time.monotonic())
        self._board.update(job.id, stage="encoding" if pictures else "sampling", share=0.01)
        try:
            async with contextlib.aclosing(self._pieces(job, pictures, options, every)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Mesh):
                        follow.end()
                        return piece
                    follow.see(piece)
        finally:
            follow.close()
        raise AssertionError("a stream of the client ends with a mesh or an error")

    async def _pieces(
        self, job: Job, pictures: Sequence[bytes], options: Mapping[str, Any], every: int
    ) -> AsyncGenerator[Step | MeshProgress | Mesh, None]:
        if pictures:
            async with self._client.generate_stream(list(pictures), **options, preview_every=every) as pieces:
                async for piece in pieces:
                    yield piece
            return
        sampling = {name: value for name, value in options.items() if name in _SAMPLING}
        latents = None
        async with self._client.stream(embed_prompt(job.prompt), **sampling, preview_every=every) as steps:
            async for step in steps:
                latents = step.latents
                yield step
        if not self.solid:
            assert latents is not None  # a trajectory's last step always has them
            yield await asyncio.to_thread(points.mesh_of, latents, job.format)
            return
        meshing = {name: value for name, value in options.items() if name in _MESHING}
        async with self._client.decode_stream(latents, **meshing) as answers:
            async for answer in answers:
                yield answer


class _Follow:
    """Follows one job: its stages, its time left, its previews."""

    def __init__(self, generation: Generation, job: Job, *, started: float) -> None:
        self._of = generation
        self._job = job
        self._started = started
        self._share = 0.0  # never goes back: the number of refinements is known only after the first wave
        self._sampling_from: float | None = None
        self._meshing_from: float | None = None
        self._before: tuple[float, previews.Latents] | None = None
        self._decoding: asyncio.Future[None] | None = None
        self._resolution = int(job.options.get("resolution") or _USUAL_RESOLUTION)

    def see(self, piece: Step | MeshProgress) -> None:
        """Put a step, or the progress of the mesh, on the board."""
        now = time.monotonic()
        if isinstance(piece, Step):
            self._see_step(piece, now)
            return
        self._meshing_from = self._meshing_from or now
        spent, usual = now - self._meshing_from, self._of._pace.mesh_s(self._resolution)
        levels = piece.level / (piece.levels + 1)
        part = max(levels, min(0.95, spent / usual)) if usual else levels
        left = max(0.5, usual - spent) if usual else None
        self._share = max(self._share, _SAMPLED + (0.99 - _SAMPLED) * part)
        self._of._board.update(
            self._job.id, stage="meshing", step=piece.level, total=piece.levels, share=round(self._share, 4), left_s=left
        )

    def _see_step(self, step: Step, now: float) -> None:
        if self._sampling_from is None:
            self._sampling_from = now
        left = None
        if step.index > 1:
            each = (now - self._sampling_from) / (step.index - 1)
            left = each * (step.total - step.index) + (self._of._pace.mesh_s(self._resolution) or 0.0)
        share = _ENCODED + (_SAMPLED - _ENCODED) * step.index / step.total
        self._of._board.update(
            self._job.id, stage="sampling", step=step.index, total=step.total, share=round(share, 4), left_s=left
        )
        if step.latents is not None and self._of._previews:
            self._preview(step.latents, step.t)

    def _preview(self, latents: previews.Latents, t: float) -> None:
        """Show the shape that the latents head for: at once where they are points, else by a coarse decode beside the sampling."""
        if self._of.pointed:
            self._of._board.update(self._job.id, preview=previews.of_points(latents))
            return
        before_t, before = self._before or (0.0, noise(int(self._job.options.get("seed") or 0), latents.shape[1]))
        self._before = t, latents
        if self._of._previewing or t <= before_t:
            return  # one at a time in this gateway, so that previews slow no job down by much
        self._decoding = asyncio.ensure_future(self._decode(previews.extrapolated(latents, t, before, before_t)))
        self._of._previewing.add(self._job.id)
        self._decoding.add_done_callback(lambda _: self._of._previewing.discard(self._job.id))

    async def _decode(self, latents: previews.Latents) -> None:
        try:
            resolution = self._of._preview_resolution
            mesh = await self._of._client.decode(np.asarray(latents), resolution=resolution, format="stl", timeout_s=20)
        except Hunyuan3DError as error:
            logger.debug("job %s has no preview: %s", self._job.id, error)  # an early state often has no surface
            return
        if self._of._board.get(self._job.id) is not None:
            self._of._board.update(self._job.id, preview=await asyncio.to_thread(previews.of_stl, mesh.data))

    def close(self) -> None:
        """Stop a preview that is still decoded."""
        if self._decoding is not None:
            self._decoding.cancel()

    def end(self) -> None:
        """Learn how long the job took."""
        now = time.monotonic()
        self._of._pace.note(job_s=now - self._started, mesh_s=now - (self._meshing_from or now), resolution=self._resolution)
