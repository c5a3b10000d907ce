"""The interface of upstream's own server, version 2.0 and 2.1: Blender's add-on, blender-mcp and many scripts speak it.

Keys that are not named here are ignored and reach nothing. `num_chunks` of 2.1 is such a key.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ..failures import refused
from ..jobs import Job, State, Wanted
from ..options import SEEDS, RemoveBackground, checked
from ..pictures import from_base64
from ..service import Caller
from .common import (
    LOOKING,
    TAKING,
    WAITING,
    Context,
    From,
    Idempotency,
    InContext,
    file_answer,
    finished,
    format_of,
    pictures_of,
    words_of,
)

router = APIRouter(tags=["upstream"])
INTERFACE = "upstream"


class Body(BaseModel):
    """A request for a mesh. num_inference_steps and guidance_scale that are left out are the deployed preset's own."""

    model_config = ConfigDict(extra="ignore")
    image: Annotated[str | None, Field(description="base64 of a PNG, JPEG or WebP picture, bare or as a data URI")] = None
    text: Annotated[str | None, Field(description="words, where the server has a stage for them")] = None
    mesh: Annotated[str | None, Field(description="refused: there is no stage for textures")] = None
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] = 1234
    octree_resolution: int = 128
    num_inference_steps: int | None = None
    guidance_scale: Annotated[float | None, Field(allow_inf_nan=False)] = None
    texture: Annotated[bool, Field(description="true is refused: there is no stage for textures")] = False
    face_count: int = 40_000
    remove_background: RemoveBackground = None
    type: str = "glb"


class Sent(BaseModel):
    """The id of a job that was taken."""

    uid: str


class Status(BaseModel):
    """How a job is: processing; completed, with the file; or error, with the reason."""

    status: str
    model_base64: str | None = None
    message: str | None = None


_FILE: dict[str, Any] = {"model/gltf-binary": {"schema": {"type": "string", "format": "binary"}}}


@router.post(
    "/generate", response_class=Response, responses={200: {"content": _FILE, "description": "The mesh file."}, **WAITING}
)
async def generate(body: Body, request: Request, context: InContext, caller: From, key: Idempotency) -> Response:
    """Make a mesh and answer with its file."""
    job = await finished(context, request, await _submit(context, caller, body, key), caller)
    return file_answer(job, await context.service.content(job), job.format)


@router.post("/send", responses=TAKING)
async def send(body: Body, context: InContext, caller: From, key: Idempotency) -> Sent:
    """Take a job, and answer at once."""
    return Sent(uid=(await _submit(context, caller, body, key)).id)


@router.get("/status/{uid}", response_model_exclude_none=True, responses=LOOKING)
async def status(uid: str, context: InContext, caller: From) -> Status:
    """How a job is. An unknown uid is an error too, with status 200: programs probe a server with one."""
    try:
        job = await context.service.get(uid, caller)
    except Exception as error:
        if getattr(error, "status", 0) != 404:
            raise
        return Status(status="error", message=str(error))
    return await _status(context, job)


async def _status(context: Context, job: Job) -> Status:
    if not job.state.final:
        return Status(status="processing")
    if job.state is State.COMPLETED:
        return Status(status="completed", model_base64=base64.b64encode(await context.service.content(job)).decode())
    failure = job.failure
    text = f"{failure.text} {failure.hint}".strip() if failure else f"The job was {job.state.value}."
    return Status(status="error", message=text)


async def _submit(context: Context, caller: Caller, body: Body, key: str | None) -> Job:
    if body.texture or body.mesh:
        raise refused(
            422, "no_texture_stage", "This server makes shapes without textures.", "Turn `texture` off and send a picture."
        )
    options = checked(
        context.settings, steps=body.num_inference_steps, seed=body.seed, guidance_scale=body.guidance_scale,
        resolution=body.octree_resolution, max_faces=body.face_count, remove_background=body.remove_background,
    )  # fmt: skip
    format = format_of(body.type)
    prompt = "" if body.image else words_of(body.text)
    pictures = await pictures_of(context, [from_base64(body.image)]) if body.image else ()
    wanted = Wanted(interface=INTERFACE, prompt=prompt, pictures=pictures, options=options, format=format)
    return await context.service.submit(wanted, caller, idempotency_key=key)
