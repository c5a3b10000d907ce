"""The ASGI application: interfaces, page, and one way in which each interface says that something went wrong."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import sqlalchemy.exc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from .failures import Failure, Refused, printable
from .gateway import Gateway
from .interfaces import health, infer, jobs, meshes, upstream
from .interfaces.common import Context
from .security import Door, Shield

PAGE = Path(__file__).parent / "page"
_TEXT = """One port for the page, for the interface of upstream's own server (`/generate`, `/send`, `/status`), for jobs
(`/v1/meshes`, `/v1/jobs`) and for NIM's (`/v1/infer`)."""

logger = logging.getLogger(__name__)


def create_app(gateway: Gateway) -> FastAPI:
    """The application of a gateway, which starts and ends with it."""
    settings = gateway.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running() as service:
            app.state.context = Context(settings, service, Door(gateway.keys, required=settings.require_key))
            app.state.running = lambda: gateway.runner.running
            yield

    app = FastAPI(title="Hunyuan3D gateway", description=_TEXT, lifespan=lifespan, docs_url=None, redoc_url=None, version="1")
    app.state.owner, app.state.metrics = gateway.owner, gateway.metrics
    for each in (upstream, meshes, jobs, infer, health):
        app.include_router(each.router)
    _add_page(app)
    for kind in (Refused, RequestValidationError, HTTPException, sqlalchemy.exc.SQLAlchemyError, Exception):
        app.add_exception_handler(kind, _handle)
    if settings.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origin, allow_methods=["*"], allow_headers=["*"])
    if settings.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    app.add_middleware(
        Shield, max_body_bytes=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s, cors=settings.cors_origin,
        count=gateway.metrics.answered, fail=answer,
    )  # fmt: skip
    return app


def _add_page(app: FastAPI) -> None:
    def send(name: str) -> Callable[[], FileResponse]:
        return lambda: FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    app.add_api_route("/", send("index.html"), methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", send("docs.html"), methods=["GET"], include_in_schema=False)
    app.add_api_route("/favicon.ico", send("icon.svg"), methods=["GET"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=PAGE), name="static")


async def _handle(request: Request, error: Exception) -> Response:
    return answer(request, error)


def answer(request: Request, error: Exception) -> Response:
    """The answer to a request that failed, in the form of the interface that it was sent to."""
    refusal = _refusal(error)
    if refusal.status >= 500 and refusal.failure.code in ("internal", "no_database"):
        logger.error("a request failed", exc_info=error)
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(math.ceil(refusal.retry_after_s))}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif refusal.status in (429, 503):
        headers.setdefault("Retry-After", "10")
    elif refusal.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(_body(request.url.path, refusal.failure), refusal.status, headers=headers)


def _refusal(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        unreadable = first["type"] in ("json_invalid", "missing", "model_attributes_type") and not where.strip("0123456789")
        text = f"{where or 'The body'}: {first['msg']}."
        return Refused(400 if unreadable else 422, Failure("bad_request", printable(text), "See /docs for the fields."))
    if isinstance(error, HTTPException):
        return Refused(error.status_code, Failure("bad_request", printable(str(error.detail)), "See /docs."))
    if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        return Refused(503, Failure("no_database", "The database does not answer.", "Try again in a minute."))
    return Refused(500, Failure("internal", "The gateway failed.", "The gateway's log says more."))


def _body(path: str, failure: Failure) -> dict[str, Any]:
    """Upstream's clients read `text` and `error_code`, SGLang's and NIM's `detail`; `error` is for all."""
    error = {"code": failure.code, "message": failure.text, "hint": failure.hint}
    words = f"{failure.text} {failure.hint}".strip()
    if path.startswith(("/generate", "/send", "/status")):
        return {"text": words, "error_code": 1, "error": error}
    return {"detail": words, "error": error}
