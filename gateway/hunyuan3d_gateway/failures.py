"""What can go wrong, in words for the person who asked: a code, an HTTP status, what happened, what to do.

The class of a client's error decides the failure, never the words of its message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hunyuan3d_client import errors


@dataclasses.dataclass(frozen=True)
class Failure:
    """code: for programs. text and hint: for people."""

    code: str
    text: str
    hint: str = ""


class Refused(Exception):
    """A request that the gateway does not carry out. `status` is the HTTP status; retry_after_s becomes the header Retry-After."""

    def __init__(self, status: int, failure: Failure, *, retry_after_s: float | None = None) -> None:
        super().__init__(failure.text)
        self.status = status
        self.failure = failure
        self.retry_after_s = retry_after_s


def refused(status: int, code: str, text: str, hint: str = "") -> Refused:
    """A Refused of its parts."""
    return Refused(status, Failure(code, printable(text), printable(hint)))


def printable(text: str) -> str:
    """The text without characters that UTF-8 cannot carry or a log should not."""
    kept = "".join(c for c in text if c in "\n\t" or (c >= " " and c != "\x7f"))
    return kept.encode("utf-8", "replace").decode()


# HTTP status of a failed job, where an interface waits for its end.
STATUS_OF: Mapping[str, int] = {
    "invalid_input": 422,
    "cancelled": 409,
    "no_server": 503,
    "not_deployed": 503,
    "overloaded": 503,
    "timeout": 504,
    "model_failed": 502,
    "gateway_lost": 503,
    "store_full": 507,
    "internal": 500,
}
_OF_CLIENT: Mapping[type[errors.Hunyuan3DError], tuple[str, str, str]] = {
    errors.InvalidInput: ("invalid_input", "The server could not use this input", "Try another picture or other settings."),
    errors.Overloaded: ("overloaded", "All servers are busy", "Try again in a few minutes."),
    errors.DeadlineExceeded: (
        "timeout",
        "The work took longer than its time limit",
        "Ask for fewer steps or a lower resolution.",
    ),
    errors.Cancelled: ("cancelled", "The work was stopped", "Start it again."),
    errors.ServerUnavailable: (
        "no_server",
        "No server answers",
        "Try again in a few minutes; the operator sees more: hunyuan3d health.",
    ),
    errors.ModelNotReady: (
        "not_deployed",
        "The server lacks a model for this",
        "The operator can deploy it: hunyuan3d-export deploy.",
    ),
    errors.ModelFailed: ("model_failed", "The model failed", "Try other settings; the server's log says more."),
}


def of_error(error: BaseException) -> Failure:
    """The failure that an exception of a job's run means."""
    if isinstance(error, Refused):
        return error.failure
    for kind, (code, text, hint) in _OF_CLIENT.items():
        if isinstance(error, kind):
            return Failure(code, printable(f"{text}: {str(error).partition(chr(10))[0]}"), hint)
    if isinstance(error, OSError):
        return Failure("store_full", "The gateway could not store the result.", "The operator sees why in the gateway's log.")
    return Failure("internal", "The gateway failed.", "The gateway's log says more.")
