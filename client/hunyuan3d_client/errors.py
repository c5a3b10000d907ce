"""The errors that the client raises.

    Hunyuan3DError
    ├── InvalidInput       also a ValueError        the request is wrong; sending it again cannot help
    ├── Overloaded         retry_after_s            the server is up and refused the request before running it
    ├── DeadlineExceeded   also a TimeoutError      timeout_s passed, or a time limit of the server
    ├── Cancelled                                   the caller stopped the call, or closed the client
    ├── ServerUnavailable  also a ConnectionError   no server answers, the connection broke or the server refuses this caller
    ├── ModelNotReady                               the server is up; the model is missing, loading or of another contract
    └── ModelFailed                                 the model ran and failed, or its answer breaks the contract

The class follows from the gRPC status (BY_STATUS) and from facts that the client knows or asks for: the deadline, and whether
the model is ready. It never follows from the text of a message.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc


class Hunyuan3DError(Exception):
    """The base of all. `status` is the gRPC status behind the error, or None if the client found the fault by itself."""

    hint = "see the cause"

    def __init__(
        self,
        message: str,
        *,
        status: grpc.StatusCode | None = None,
        request_id: str | None = None,
        model: str | None = None,
        attempt: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id
        self.model = model
        self.attempt = attempt  # 1: the request was sent once; 0: it was never sent


class InvalidInput(Hunyuan3DError, ValueError):
    """The request is wrong; sending it again cannot help."""

    hint = "the server refused a request that this client found valid; see what is deployed: hunyuan3d health"


class Overloaded(Hunyuan3DError):
    """The server is up and refused the request before running it; try again after `retry_after_s` seconds."""

    hint = "try again later, or raise retries="
    retry_after_s: float = 1.0


class DeadlineExceeded(Hunyuan3DError, TimeoutError):
    """timeout_s, or a time limit of the server, passed before the answer was complete."""

    hint = "raise timeout_s="


class Cancelled(Hunyuan3DError):
    """The call was stopped: by the caller, or because the client was closed."""

    hint = "the caller or the server stopped the call, or the client was closed"


class ServerUnavailable(Hunyuan3DError, ConnectionError):
    """No server answers, the connection broke, or the server refuses this caller."""

    hint = "check the address and the server: hunyuan3d health --url HOST:PORT"


class ModelNotReady(Hunyuan3DError):
    """The server is up, but the model is missing, still loading, or speaks another contract."""

    hint = "see what is loaded: hunyuan3d health; place what is missing: hunyuan3d-export deploy"


class ModelFailed(Hunyuan3DError):
    """The model ran and failed, or its answer breaks the contract."""

    hint = "the server's log says more"


BY_STATUS: Mapping[grpc.StatusCode, type[Hunyuan3DError]] = {
    grpc.StatusCode.CANCELLED: DeadlineExceeded,  # a server cancels when a time limit has passed; Exchange tells a closed client
    grpc.StatusCode.UNKNOWN: ModelFailed,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: ModelNotReady,
    grpc.StatusCode.ALREADY_EXISTS: ModelFailed,
    grpc.StatusCode.PERMISSION_DENIED: ServerUnavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: ModelNotReady,
    grpc.StatusCode.ABORTED: ModelFailed,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.UNIMPLEMENTED: ModelNotReady,
    grpc.StatusCode.INTERNAL: ModelFailed,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,  # Triton says it of a full queue too; Exchange tells them apart
    grpc.StatusCode.DATA_LOSS: ModelFailed,
    grpc.StatusCode.UNAUTHENTICATED: ServerUnavailable,
}


def invalid(what: str, expected: str, found: object, hint: str) -> InvalidInput:
    """An InvalidInput in the form of all input errors: what must be what, what was found, how to fix it."""
    return InvalidInput(f"{what} must be {expected}, got {found}\nhint: {hint}")
