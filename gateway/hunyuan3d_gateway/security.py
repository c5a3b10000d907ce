"""What every request passes: who calls, bounds on the body, the page's origin, and the headers that protect browsers."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request

from .failures import Refused, refused
from .keys import Keys, digest
from .service import Caller

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# model-viewer makes textures and its worker-free loaders of blob: URLs; everything else comes from this gateway.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

logger = logging.getLogger(__name__)


class Shield:
    """Adds the headers to every answer and counts it. Bodies that are too large or too slow are refused while they arrive.

    body_timeout_s: the time in which a whole body must arrive. `count` is told the pattern of each route and the status. `fail`
    answers with an error in the form of the interface.
    """

    def __init__(
        self, app: App, *, max_body_bytes: int, body_timeout_s: float, cors: Iterable[str],
        count: Callable[[str, int], None], fail: Callable[..., Any],
    ) -> None:  # fmt: skip
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._cors = frozenset(cors)
        self._count = count
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._max_body_bytes, self._body_timeout_s)
        exchange = _Exchange(scope, body, send, self._count)
        headers = Headers(scope=scope)
        try:
            _check_origin(headers, self._cors)
            _check_length(headers, self._max_body_bytes)
            await self._app(scope, body.receive, exchange.send)
            if body.refusal is not None and not exchange.begun:
                raise body.refusal
        except Exception as error:
            if exchange.begun:
                raise
            body.refusal = None
            await self._fail(Request(scope), error)(scope, receive, exchange.send)


class _Body:
    """The body of one request. refusal: why no more of it is taken."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self.refusal: Refused | None = None
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._taken = 0
        self._whole = False

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self._whole else self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            self.refusal = too_slow(self._timeout_s)
            raise self.refusal from error
        self._whole = not message.get("more_body", False)
        self._taken += len(message.get("body", b""))
        if self._taken > self._max_bytes:
            self.refusal = too_large(self._max_bytes)
            raise self.refusal
        return message


class _Exchange:
    """The answer to one request. begun: it is on its way."""

    def __init__(self, scope: Scope, body: _Body, send: Send, count: Callable[[str, int], None]) -> None:
        self.begun = False
        self._scope, self._body, self._send = scope, body, send
        self._count = count

    async def send(self, message: Message) -> None:
        if self._body.refusal is not None and not self.begun:
            return  # the application takes the broken body for a broken request; the refusal that follows tells the reason
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            self._count(getattr(self._scope.get("route"), "path", "other"), message["status"])
        await self._send(message)


def too_large(most: int) -> Refused:
    """The refusal of a body above the bound."""
    return refused(413, "too_large", f"The request is larger than {most} bytes.", "Send a smaller picture.")


def too_slow(most_s: float) -> Refused:
    """The refusal of a body that did not arrive in time."""
    return refused(408, "too_slow", f"The request did not arrive within {most_s:g} s.", "Send a smaller picture.")


def _check_length(headers: Headers, most: int) -> None:
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise refused(400, "bad_request", "The header Content-Length must be a number.")
    if int(length) > most:
        raise too_large(most)


def _check_origin(headers: Headers, allowed: frozenset[str]) -> None:
    """Refuses requests that a page of another site makes: a browser sends simple ones without asking, whatever CORS says."""
    origin = headers.get("origin")
    if origin is None or origin in allowed:
        return
    if urlsplit(origin).netloc != headers.get("host"):
        raise refused(
            403, "other_origin", "Pages of other sites may not call this gateway.", "The operator can allow one: --cors-origin."
        )


class Door:
    """Tells who calls: the name of a key, or the address."""

    def __init__(self, keys: Keys, *, required: bool) -> None:
        self._keys = keys
        self._required = required

    async def caller(self, request: Request) -> Caller:
        """The caller of a request. Raises Refused for a missing or unknown key where keys are used."""
        known = await self._keys.known()
        key = _key(request.headers)
        if key is not None and (name := known.get(digest(key))) is not None:
            return Caller(f"key:{name}", keyed=True)
        if known or self._required:
            text = "This key is not known." if key is not None else "This gateway asks for a key."
            raise refused(401, "key_needed", text, "Send it as `Authorization: Bearer KEY`.")
        return Caller(f"address:{_network(request.client.host if request.client else '')}")

    async def asks(self) -> bool:
        """Whether callers need a key."""
        return self._required or bool(await self._keys.known())


def _key(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key")


def _network(address: str) -> str:
    """An IPv4 address, or the /64 network of an IPv6 address, of which one machine has many addresses."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network(f"{found}/64", strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)
