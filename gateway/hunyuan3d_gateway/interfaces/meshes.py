"""`/v1/meshes`, the job interface of SGLang: with true progress, a DELETE that stops the work, resolution, face budget, views."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from hunyuan3d_client import contract

from ..failures import refused
from ..jobs import Job, State, Wanted
from ..options import SEEDS, RemoveBackground, checked
from ..pictures import from_base64
from .common import (
    LOOKING,
    TAKING,
    Context,
    From,
    Idempotency,
    InContext,
    errors,
    fetched,
    file_answer,
    format_of,
    pictures_of,
    words_of,
)

router = APIRouter(prefix="/v1/meshes", tags=["meshes"])
INTERFACE = "meshes"
_VIEWS = len(contract.VIEWS)
_STATUS = {State.RUNNING: "in_progress", State.CANCELLED: "deleted"}
_FIELDS = 64
_PART_BYTES = 1 << 20  # of a field that is no file


class Options(BaseModel):
    """What can be said beside the picture. Options that are left out are the deployed preset's and the server's own."""

    model_config = ConfigDict(extra="ignore")
    prompt: Annotated[str | None, Field(description="words, where the server has a stage for them")] = None
    negative_prompt: Annotated[str | None, Field(description="refused unless it is empty: no stage takes it")] = None
    model: Annotated[str | None, Field(description="taken for compatibility; the answer says which model the server has")] = (
        None
    )
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] = 0
    guidance_scale: Annotated[float | None, Field(allow_inf_nan=False)] = None
    num_inference_steps: int | None = None
    output_format: str = "glb"
    resolution: Annotated[int | None, Field(description="cells along each side of the grid")] = None
    max_faces: Annotated[int | None, Field(description="simplify the mesh to this many triangles; 0 keeps all")] = None
    remove_background: RemoveBackground = None
    url: Annotated[str | None, Field(description="of a picture, on a host that the operator allows")] = None

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        """A form sends an empty field where a person left it empty."""
        return None if value == "" else value


class JsonBody(Options):
    """The request as JSON."""

    input_image: Annotated[str | list[str] | None, Field(description="base64 of a picture, or of up to four views")] = None


class MeshJob(BaseModel):
    """A job. progress is a percentage; stage, step and steps say what it stands for."""

    id: str
    object: Literal["mesh"] = "mesh"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "deleted"]
    progress: int
    created_at: int
    format: str
    url: str | None
    completed_at: int | None
    expires_at: int | None
    error: dict[str, str] | None
    file_path: str | None = None
    file_size_bytes: int | None
    peak_memory_mb: float | None = None
    inference_time_s: float | None
    stage: str
    step: int
    steps: int
    time_left_s: float | None
    vertices: int | None
    faces: int | None


class MeshList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[MeshJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


_BINARY = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "properties": {"image": _BINARY, "image[]": {"type": "array", "items": _BINARY}}
    | Options.model_json_schema()["properties"],
}
_REQUEST = {
    "required": True,
    "content": {"application/json": {"schema": JsonBody.model_json_schema()}, "multipart/form-data": {"schema": _FORM}},
}


@router.post("", responses=TAKING, openapi_extra={"requestBody": _REQUEST})
async def create(request: Request, context: InContext, caller: From, key: Idempotency) -> MeshJob:
    """Take a job: a picture as multipart `image` (or up to four views as `image[]`), or JSON with `input_image`."""
    options, files = await _read(request)
    if options.negative_prompt:
        raise refused(422, "no_negative_prompt", "No stage of this server takes a negative prompt.", "Leave it out.")
    if options.url is not None:
        files = [*files, await fetched(context, options.url)]
    chosen = checked(
        context.settings, steps=options.num_inference_steps, seed=options.seed, guidance_scale=options.guidance_scale,
        resolution=options.resolution, max_faces=options.max_faces, remove_background=options.remove_background,
    )  # fmt: skip
    format = format_of(options.output_format)
    prompt = "" if files else words_of(options.prompt)
    pictures = await pictures_of(context, files)
    wanted = Wanted(interface=INTERFACE, prompt=prompt, pictures=pictures, options=chosen, format=format)
    return _told(context, await context.service.submit(wanted, caller, idempotency_key=key))


@router.get("", responses=LOOKING)
async def list_jobs(
    context: InContext,
    caller: From,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> MeshList:
    """The caller's jobs."""
    found = await context.service.jobs_of(caller, limit=limit + 1, after=after, newest_first=order == "desc")
    data = [_told(context, job) for job in found[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return MeshList(data=data, first_id=first, last_id=last, has_more=len(found) > limit)


@router.get("/{id}", responses=LOOKING)
async def read(id: str, context: InContext, caller: From) -> MeshJob:
    """One job."""
    return _told(context, await context.service.get(id, caller))


@router.delete("/{id}", responses=LOOKING)
async def delete(id: str, context: InContext, caller: From) -> MeshJob:
    """Remove a job and its files. A job that runs stops, and the server is free within one step."""
    job = await context.service.stop(id, caller, State.DELETED)
    told = _told(context, job)
    return told.model_copy(update={"status": "deleted"})


@router.get(
    "/{id}/content",
    response_class=Response,
    responses={
        200: {"content": {"model/gltf-binary": {"schema": _BINARY}}, "description": "The mesh file."},
        **errors(401, 403, 404, 422, 500, 503),
    },
)
async def content(
    id: str,
    context: InContext,
    caller: From,
    format: Annotated[str | None, Query(max_length=8, description="glb, obj, stl or ply; left out: the job's own")] = None,
    download: bool = False,
) -> Response:
    """The mesh file of a completed job."""
    job = await context.service.get(id, caller)
    wanted = format_of(format or job.format)
    return file_answer(job, await context.service.content(job, wanted), wanted, download=download)


async def _read(request: Request) -> tuple[Options, list[bytes]]:
    """The options and the pictures' files of a request of either kind. Raises Refused: 400 for a body that cannot be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            async with request.form(max_files=_VIEWS + 1, max_fields=_FIELDS, max_part_size=_PART_BYTES) as form:
                return _of_form(form), await _files(form)
        if kind != "application/json":
            raise refused(
                400, "bad_request", "The body must be multipart/form-data or application/json.", "Send `image` as a file."
            )
        body = JsonBody.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        status = 400 if first["type"].startswith("json") or not where else 422
        raise refused(status, "bad_request", f"{where or 'The body'}: {first['msg']}.", "See /docs for the fields.") from error
    except HTTPException as error:
        raise refused(
            400, "bad_request", f"The form cannot be read: {error.detail}", "Send it as multipart/form-data."
        ) from error
    images = body.input_image if isinstance(body.input_image, list) else [body.input_image] if body.input_image else []
    return body, [from_base64(image) for image in images]


def _of_form(form: FormData) -> Options:
    return Options.model_validate({name: value for name, value in form.items() if isinstance(value, str)})


async def _files(form: FormData) -> list[bytes]:
    fields = [*form.getlist("image"), *form.getlist("image[]")]
    uploads = [field for field in fields if isinstance(field, UploadFile)]
    if len(uploads) > _VIEWS:
        raise refused(422, "too_many_views", f"At most {_VIEWS} views of an object are taken.", "Send fewer.")
    return [await upload.read() for upload in uploads]


def _told(context: Context, job: Job) -> MeshJob:
    """A job as SGLang's clients know it."""
    made, failure, final = job.made, job.failure, job.state.final
    model = made.model if made else context.service.model
    done = job.state is State.COMPLETED
    return MeshJob(
        id=job.id,
        model=model,
        status=_STATUS.get(job.state, job.state.value),  # type: ignore[arg-type]
        progress=100 if done else min(99, int(100 * job.progress.share)),
        created_at=int(job.created_at),
        format=job.format,
        url=f"/v1/meshes/{job.id}/content" if done else None,
        completed_at=int(job.finished_at) if final and job.finished_at else None,
        expires_at=int(job.expires_at) if job.expires_at else None,
        error={"code": failure.code, "message": failure.text, "hint": failure.hint} if failure else None,
        file_size_bytes=made.size_bytes if made else None,
        inference_time_s=made.seconds if made else None,
        stage=job.progress.stage if not final else job.state.value,
        step=job.progress.step,
        steps=job.progress.total,
        time_left_s=None if final else job.progress.left_s,
        vertices=made.vertices if made else None,
        faces=made.faces if made else None,
    )
