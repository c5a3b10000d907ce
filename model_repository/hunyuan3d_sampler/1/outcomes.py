"""How a request can end without a result, with the name of its code in pb_utils.TritonError and its word in the metrics."""

from __future__ import annotations


class Ended(Exception):
    """A network failed, or its answer cannot be used."""

    code = "INTERNAL"
    outcome = "failed"


class NoDenoiser(Ended, LookupError):
    """No model that is loaded can evaluate the request."""

    code = "NOT_FOUND"


class Overloaded(Ended):
    """The request was refused on arrival, because too many requests are in progress and waiting."""

    code = "UNAVAILABLE"
    outcome = "rejected"


class Expired(Ended):
    """A time limit has passed: the request's own, or one in config.pbtxt. Triton has no code of its own for that."""

    code = "CANCELLED"
    outcome = "expired"


class Cancelled(Ended):
    """The client cancelled the request or closed its connection."""

    code = "CANCELLED"
    outcome = "cancelled"


def code(error: Exception) -> str:
    """The name of `error`'s code in pb_utils.TritonError: a ValueError is the request's fault, an unknown error is ours."""
    if isinstance(error, Ended):
        return error.code
    return "INVALID_ARG" if isinstance(error, ValueError) else "INTERNAL"


def outcome(error: Exception) -> str:
    """The value of the label `outcome` in the metrics hunyuan3d_requests_total and hunyuan3d_mesh_requests_total."""
    if isinstance(error, Ended):
        return error.outcome
    return "invalid" if isinstance(error, ValueError) else "failed"


OUTCOMES = ("done", "cancelled", "expired", "rejected", "invalid", "failed")
