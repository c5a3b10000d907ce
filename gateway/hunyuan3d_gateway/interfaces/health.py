"""Health, readiness and metrics, under the names that each kind of client asks for."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from ..failures import refused
from .common import From, InContext, errors

router = APIRouter(tags=["health"])
INTERFACE = "health"


class Health(BaseModel):
    """This process answers."""

    status: str = "healthy"
    worker_id: str


class Ready(BaseModel):
    """A server is ready to make meshes."""

    status: str = "ready"


@router.get("/health", responses=errors(403, 500))
@router.get("/v1/health/live", responses=errors(403, 500))
async def health(request: Request) -> Health:
    """Whether this process answers."""
    return Health(worker_id=request.app.state.owner)


@router.get("/health/ready", responses=errors(403, 500, 503))
@router.get("/v1/health/ready", responses=errors(403, 500, 503))
async def ready(context: InContext) -> Ready:
    """Whether the database answers and a server is ready."""
    await context.service.counts()
    if not (await context.service.abilities()).ready:
        raise refused(503, "no_server", "No server is ready.", "The operator sees more: hunyuan3d health.")
    return Ready()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **errors(401, 403, 500, 503)})
async def metrics(request: Request, context: InContext, _caller: From) -> Response:
    """Metrics for Prometheus; with a key, where keys are used."""
    counts, size = await context.service.counts(), await context.service.size_bytes()
    text = request.app.state.metrics.text(counts, request.app.state.running(), size)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
