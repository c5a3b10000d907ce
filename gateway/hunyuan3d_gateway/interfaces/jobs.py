"""`/v1/jobs`: a job of any interface as it changes, as server-sent events; and what the page needs to know of this gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from hunyuan3d_client import contract
from hunyuan3d_client.shapes.words import ATTRIBUTES, NOUNS

from ..jobs import Job
from .common import LOOKING, From, InContext, errors

router = APIRouter(prefix="/v1", tags=["jobs"])
INTERFACE = "jobs"
_ALIVE_S = 15.0


class JobState(BaseModel):
    """A job now. preview: base64 of points x, y, z as signed bytes of hundredths; empty where nothing new is to be seen."""

    id: str
    interface: str
    state: str
    stage: str
    step: int
    total: int
    share: float
    left_s: float | None
    preview: str
    attempts: int
    error: dict[str, str] | None
    result: dict[str, Any] | None


class About(BaseModel):
    """What this gateway can make now, and the bounds of requests."""

    ready: bool
    model: str
    random_weights: bool
    meshes: bool
    views: int
    cutting: bool
    prompts: bool
    words: dict[str, list[str]]
    steps: int
    max_steps: int
    max_resolution: int
    max_body_bytes: int
    formats: list[str]
    keep_s: float


_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


@router.get("/jobs/{id}", responses=LOOKING)
async def read(id: str, context: InContext, caller: From) -> JobState:
    """A job now."""
    return _told(await context.service.get(id, caller))


@router.get(
    "/jobs/{id}/events",
    response_class=Response,
    responses={200: {"content": _EVENTS, "description": "Events `progress`, `preview` and at last `end`."}, **LOOKING},
)
async def events(id: str, context: InContext, caller: From) -> Response:
    """A job as it changes, until it has ended. A connection that breaks can be opened again at any time."""
    await context.service.get(id, caller)  # an unknown job is an error, not an empty stream
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(context.service.changes(id, caller)), media_type="text/event-stream", headers=headers)


@router.get("/about", responses=errors(401, 403, 500, 503))
async def about(context: InContext, _caller: From) -> About:
    """What this gateway can make now."""
    able, settings = await context.service.abilities(), context.settings
    words = {"attributes": list(ATTRIBUTES), "nouns": list(NOUNS)} if able.prompts else {}
    return About(
        ready=able.ready, model=able.model, random_weights=able.random, meshes=able.meshes, views=able.pictures,
        cutting=able.cutting, prompts=able.prompts, words=words, steps=able.steps, max_steps=settings.max_steps,
        max_resolution=settings.max_resolution, max_body_bytes=settings.max_body_bytes, formats=list(contract.MESH_FORMATS),
        keep_s=settings.keep_s,
    )  # fmt: skip


async def _stream(changes: AsyncGenerator[Job, None]) -> AsyncGenerator[bytes, None]:
    """Events, and a comment now and then, so that no proxy takes the connection for dead."""
    shown, coming = "", asyncio.ensure_future(anext(changes))
    try:
        while True:
            await asyncio.wait({coming}, timeout=_ALIVE_S)
            if not coming.done():
                yield b": still here\n\n"
                continue
            try:
                job = coming.result()
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(anext(changes))
            told = _told(job)
            fresh = told.preview if told.preview != shown else ""
            shown = told.preview or shown
            text = told.model_copy(update={"preview": fresh}).model_dump_json()
            yield format_sse_event(data_str=text, event="end" if job.state.final else "progress")
    finally:
        coming.cancel()
        with contextlib.suppress(BaseException):
            await coming
        await changes.aclose()


def _told(job: Job) -> JobState:
    made, failure, progress = job.made, job.failure, job.progress
    facts = {"format": made.format, "size_bytes": made.size_bytes, "vertices": made.vertices, "faces": made.faces,
             "watertight": made.watertight, "seconds": made.seconds, "sha256": made.sha256} if made else None  # fmt: skip
    error = {"code": failure.code, "text": failure.text, "hint": failure.hint} if failure else None
    return JobState(
        id=job.id, interface=job.interface, state=job.state.value, stage=progress.stage, step=progress.step,
        total=progress.total, share=progress.share, left_s=progress.left_s, preview=progress.preview, attempts=job.attempts,
        error=error, result=facts,
    )  # fmt: skip
