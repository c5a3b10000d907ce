"""Headers of calls: fixed, or from a function that is asked for each request (a token that expires, a trace's id)."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import grpc

from .deadlines import until
from .errors import invalid
from .transport import StatusError

Fixed = Mapping[str, str | bytes]
Headers = Fixed | Callable[[], Fixed | Awaitable[Fixed]]
Pairs = tuple[tuple[str, str | bytes], ...]
# The headers that gRPC takes. It refuses any other without a status, so they are checked here.
_NAME, _VALUE = re.compile(r"[0-9a-z_.-]+"), re.compile(r"[ -~]*")
_SECRET = re.compile(r"authorization|proxy-authorization|cookie|.*-(key|token)")

# The headers of the call that asks a server about itself or its models. A Request has its own.
_of_question: contextvars.ContextVar[Headers | None] = contextvars.ContextVar("headers", default=None)


def checked(headers: Fixed) -> Pairs:
    """The headers as gRPC takes them. Raises InvalidInput, without the value, which may be a secret."""
    for name, value in headers.items():
        fits = isinstance(value, bytes) if name.endswith("-bin") else isinstance(value, str) and _VALUE.fullmatch(value)
        if not (_NAME.fullmatch(name) and fits):
            expected = "lower-case names of letters, digits and _.-, with printable ASCII values (bytes for names in -bin)"
            raise invalid("headers", expected, f"another form in {name!r}", "a value read from a file may end in a line break")
    return tuple(headers.items())


async def resolved(headers: Headers | None, *, timeout_s: float) -> Pairs:
    """The headers of one request. A function runs on a thread, so that it may ask another service; a coroutine is awaited.

    Raises InvalidInput, StatusError when the function takes longer than `timeout_s`, and whatever the function raises.
    """
    if headers is None or isinstance(headers, Mapping):
        return checked(headers or {})
    left = until(timeout_s)
    try:
        found = (
            headers() if inspect.iscoroutinefunction(headers) else await asyncio.wait_for(asyncio.to_thread(headers), left())
        )
        return checked(await asyncio.wait_for(found, left()) if inspect.isawaitable(found) else found)
    except asyncio.TimeoutError as error:
        raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the function of headers= took too long") from error


@contextmanager
def of_question(headers: Headers | None) -> Iterator[None]:
    """Questions that are asked inside the block carry these headers."""
    token = _of_question.set(headers)
    try:
        yield
    finally:
        _of_question.reset(token)


def current_question() -> Headers | None:
    """The headers that the block around a question has set."""
    return _of_question.get()


def names_secrets(pairs: Pairs) -> list[str]:
    """The names of the headers whose values are secrets."""
    return [name for name, _ in pairs if _SECRET.fullmatch(name)]
