"""How a request can end without a result: each kind with the name of its code in pb_utils.TritonError and in the metrics."""

from __future__ import annotations


class Ended(Exception):
    """The denoiser failed, or its answer cannot be used."""

    code = "INTERNAL"
    outcome = "failed"


class NoDenoiser(Ended, LookupError):
    """Nothing that is loaded can evaluate the request."""

    code = "NOT_FOUND"


class Overloaded(Ended):
    """Refused at once because too much is in progress and waiting."""

    code = "UNAVAILABLE"
    outcome = "rejected"


class Expired(Ended):
    """A time limit has passed: the request's own, or one of config.pbtxt's. Triton has no code for it but this one."""

    code = "CANCELLED"
    outcome = "expired"


class Cancelled(Ended):
    """The client went away."""

    code = "CANCELLED"
    outcome = "cancelled"


def code(error: Exception) -> str:
    """The name of `error`'s code in pb_utils.TritonError: a ValueError is the request's fault, what is unknown is ours."""
    if isinstance(error, Ended):
        return error.code
    return "INVALID_ARG" if isinstance(error, ValueError) else "INTERNAL"


def outcome(error: Exception) -> str:
    """`error`'s kind in the metric hunyuan3d_requests_total."""
    if isinstance(error, Ended):
        return error.outcome
    return "invalid" if isinstance(error, ValueError) else "failed"


OUTCOMES = ("done", "cancelled", "expired", "rejected", "invalid", "failed")
