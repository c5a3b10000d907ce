"""`/v1/infer`, as NVIDIA's NIM for TRELLIS has it: one request, one answer with the mesh in base64."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from ..jobs import Wanted
from ..options import SEEDS, checked
from ..pictures import from_base64
from .common import WAITING, From, Idempotency, InContext, finished, format_of, pictures_of, words_of

router = APIRouter(prefix="/v1", tags=["infer"])
INTERFACE = "infer"


class Body(BaseModel):
    """A request for one mesh. Keys that are not named here are ignored."""

    model_config = ConfigDict(extra="ignore")
    image: Annotated[str | None, Field(description="a picture as a data URI, or bare base64")] = None
    prompt: Annotated[str | None, Field(description="words, where the server has a stage for them")] = None
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] = 0
    output_format: str = "glb"
    samples: Annotated[Literal[1], Field(description="one mesh a request")] = 1


class Artifact(BaseModel):
    """A mesh file."""

    base64: str
    finishReason: Literal["SUCCESS"] = "SUCCESS"
    seed: int


class Artifacts(BaseModel):
    """The answer."""

    artifacts: list[Artifact]


@router.post("/infer", responses=WAITING)
async def infer(body: Body, request: Request, context: InContext, caller: From, key: Idempotency) -> Artifacts:
    """Make a mesh and answer with its file in base64."""
    format = format_of(body.output_format)
    prompt = "" if body.image else words_of(body.prompt)
    pictures = await pictures_of(context, [from_base64(body.image)]) if body.image else ()
    options = checked(context.settings, seed=body.seed)
    wanted = Wanted(interface=INTERFACE, prompt=prompt, pictures=pictures, options=options, format=format)
    job = await context.service.submit(wanted, caller, idempotency_key=key)
    data = await context.service.content(await finished(context, request, job, caller))
    return Artifacts(artifacts=[Artifact(base64=base64.b64encode(data).decode(), seed=body.seed)])
