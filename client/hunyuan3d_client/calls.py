"""What belongs to one call of a client, whatever it asks for: its deadline, its id and its headers."""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from collections.abc import Mapping

from .errors import invalid
from .headers import Headers, checked

_LONGEST_S = 86_400.0
_ID = re.compile(r"[!-~]{1,128}")


@dataclasses.dataclass(frozen=True)
class Call:
    """`deadline` in time.monotonic()'s seconds. All requests of a call share its id, by which server and client log them."""

    deadline: float
    request_id: str
    headers: Headers | None = None


def call(timeout_s: float, *, request_id: str | None = None, headers: Headers | None = None) -> Call:
    """A call that begins now. Raises InvalidInput."""
    if isinstance(timeout_s, bool) or not (isinstance(timeout_s, (int, float)) and 0 < timeout_s <= _LONGEST_S):
        raise invalid(
            "timeout_s", f"seconds, above 0 and at most {_LONGEST_S}", repr(timeout_s), "leave it out for the client's"
        )
    if request_id is not None and not (isinstance(request_id, str) and _ID.fullmatch(request_id)):
        raise invalid("request_id", "1 to 128 printable ASCII characters without spaces", repr(request_id), "such as a UUID")
    if isinstance(headers, Mapping):
        checked(headers)
    elif headers is not None and not callable(headers):
        raise invalid("headers", "a mapping, or a function that returns one", type(headers).__name__, "{'traceparent': '...'}")
    return Call(time.monotonic() + timeout_s, uuid.uuid4().hex if request_id is None else request_id, headers)
