"""What the interfaces share: the gateway behind a request, its caller, pictures of requests, waiting for a job."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response

from ..failures import STATUS_OF, Refused, refused
from ..fetching import fetch
from ..jobs import MEDIA_TYPES, Job, State
from ..options import known_words, prompt
from ..pictures import cleaned
from ..security import Door
from ..service import Caller, Service
from ..settings import Settings

_LOOK_S = 1.0
_KEY = re.compile(r"[\x21-\x7e]{1,128}")
CLIENT_GONE = 499  # a status that no caller sees: the connection is closed


@dataclasses.dataclass(frozen=True)
class Context:
    """What a request reaches of the gateway."""

    settings: Settings
    service: Service
    door: Door


def context_of(request: Request) -> Context:
    """The gateway behind a request."""
    found: Context = request.app.state.context
    return found


async def caller_of(request: Request) -> Caller:
    """Who calls. Raises Refused."""
    return await context_of(request).door.caller(request)


def idempotency_key(key: Annotated[str | None, Header(alias="Idempotency-Key", max_length=128)] = None) -> str | None:
    """The header Idempotency-Key: a request that is sent twice with one key makes one job."""
    if key is not None and not _KEY.fullmatch(key):
        raise refused(422, "bad_idempotency_key", "Idempotency-Key must be 1 to 128 visible ASCII characters.", "Use a UUID.")
    return key


InContext = Annotated[Context, Depends(context_of)]
From = Annotated[Caller, Depends(caller_of)]
Idempotency = Annotated[str | None, Depends(idempotency_key)]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documented errors of a route, for OpenAPI."""
    words = {
        400: "The request cannot be read.", 401: "A key is needed.", 403: "A page of another site calls.", 404: "There is no such job.",
        408: "The request did not arrive in time.",
        409: "The job was stopped, or the Idempotency-Key stands for another request.", 413: "The request is too large.",
        422: "The request cannot be carried out.", 429: "The queue is full; see Retry-After.", 500: "The gateway failed.",
        502: "The model failed.", 503: "No server, or a model that is not deployed.", 504: "The job's time limit passed.",
        507: "The store is full.",
    }  # fmt: skip
    return {status: {"description": words[status]} for status in statuses}


TAKING = errors(400, 401, 403, 408, 409, 413, 422, 429, 500, 503, 507)
WAITING = errors(*(status for status in (502, 504)), *(int(status) for status in TAKING))
LOOKING = errors(401, 403, 404, 422, 500, 503)


async def pictures_of(context: Context, files: Sequence[bytes]) -> tuple[bytes, ...]:
    """The pictures of a request, written anew. Raises Refused."""
    most = context.settings.max_pixels
    return tuple([await asyncio.to_thread(cleaned, data, max_pixels=most) for data in files])


async def fetched(context: Context, url: str) -> bytes:
    """The picture that a URL leads to, if the operator allows its host. Raises Refused."""
    settings = context.settings
    bounds = {"hosts": settings.allow_url_host, "networks": settings.allow_url_network, "max_bytes": settings.max_body_bytes}
    return await asyncio.to_thread(lambda: fetch(url, **bounds))  # type: ignore[arg-type]


def words_of(text: str | None) -> str:
    """A prompt whose words the weights know; empty for none. Raises Refused."""
    words = prompt(text)
    if words:
        known_words(words)
    return words


def format_of(name: str) -> str:
    """A format of mesh files. Raises Refused."""
    format = name.lower().removeprefix(".")
    if format not in MEDIA_TYPES:
        raise refused(422, "unknown_format", f"The format must be one of {', '.join(MEDIA_TYPES)}.", "Most programs read glb.")
    return format


async def finished(context: Context, request: Request, job: Job, caller: Caller) -> Job:
    """The job when it has completed. A caller who goes away meanwhile stops the job. Raises Refused for any other end."""
    waiting = asyncio.ensure_future(context.service.wait(job.id, caller))
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=_LOOK_S)
            if not waiting.done() and await request.is_disconnected():
                await context.service.stop(job.id, caller, State.CANCELLED)
                raise refused(CLIENT_GONE, "cancelled", "The caller went away.")
        job = waiting.result()
    finally:
        waiting.cancel()
    if job.state is State.COMPLETED:
        return job
    if job.failure is None:
        raise refused(409, "cancelled", "The job was stopped.", "Start it again.")
    raise Refused(STATUS_OF.get(job.failure.code, 500), job.failure)


def file_answer(job: Job, data: bytes, format: str, *, download: bool = False) -> Response:
    """A mesh file as an answer, under a name that no caller chooses."""
    kind = "attachment" if download else "inline"
    headers = {
        "Content-Disposition": f'{kind}; filename="mesh-{job.id[:8]}.{format}"',
        "Cache-Control": "private, max-age=3600",
    }
    return Response(data, media_type=MEDIA_TYPES[format], headers=headers)
