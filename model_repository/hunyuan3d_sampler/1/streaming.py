"""What the models that stream responses share: requests, deadlines, errors and log lines.

hunyuan3d_mesh and the unary models link to this file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from outcomes import Cancelled, Expired, Overloaded, code, outcome

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# Triton has no code for an error in a stream, and drops the code in a call between models. The client and the unary models
# therefore set this request parameter. With it, an error is the output `error`, which holds the code's name and the text, and
# the response has no other output.
ERRORS_AS_OUTPUTS = "errors_as_outputs"
ERROR = "error"
# An environment variable with the path of a file. The container's entrypoint makes that file before it stops the server; from
# then on new requests are refused.
DRAIN_FILE = "HUNYUAN3D_DRAIN_FILE"
_LONGEST_ID = 64

logger = logging.getLogger(__name__)


class Stream:
    """The responses of one request."""

    def __init__(self, request: object) -> None:
        self.request_id = loggable(request.request_id())
        self.requested = request.requested_output_names()
        self._began = time.monotonic()
        self._sender = request.get_response_sender()
        # Triton would drop an output that was not asked for, and the client would get an empty response.
        self._errors_as_outputs = ERROR in self.requested and ERRORS_AS_OUTPUTS in json.loads(request.parameters() or "{}")
        timeout_us = request.timeout()
        self._deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else None

    def cancelled(self) -> Exception | None:
        """Why nobody waits for the next response any more; None while somebody does."""
        if self._sender.is_cancelled():
            return Cancelled("the client cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return Expired("the request's deadline has passed")
        return None

    def send(self, outputs: Sequence[object], *, final: bool = False) -> None:
        self._sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL if final else 0)

    def done(self, text: str) -> None:
        """Writes a line to the log a little later, because logging is slow and the next work comes first."""
        asyncio.get_running_loop().call_soon(self._log, logging.INFO, f"done: {text}")

    def fail(self, error: Exception) -> None:
        """Ends the request with an error."""
        name = code(error)
        if self._errors_as_outputs:
            answer = pb_utils.InferenceResponse(
                [pb_utils.Tensor(ERROR, np.array([name.encode(), str(error).encode()], np.object_))]
            )
        else:  # TritonError is looked up here, because pb_utils gets it only after models are imported
            answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, name)))
        self._sender.send(answer, flags=FINAL)
        kind = outcome(error)
        self._log(logging.ERROR if kind == "failed" else logging.INFO, f"{kind}: {str(error).partition(chr(10))[0]}")

    def _log(self, level: int, text: str) -> None:
        logger.log(level, "request %s %s, after %.3f s", self.request_id, text, time.monotonic() - self._began)


class Drain:
    """Whether the container is about to stop the server."""

    def __init__(self) -> None:
        self._file = Path(os.environ[DRAIN_FILE]) if DRAIN_FILE in os.environ else None

    def check(self, work: str) -> None:
        """Raises Overloaded when the server is stopping. work: what is refused, in the plural."""
        if self._file is not None and self._file.exists():
            raise Overloaded(f"The server is stopping and takes no new {work}.\nhint: send the request to another server")


def loggable(request_id: str) -> str:
    """A client's request id as one word: it must not start a new line in the log, nor look like several ids with commas."""
    return re.sub(r"[^\w.:-]", "?", request_id, flags=re.ASCII)[:_LONGEST_ID] or "-"


def log_to_triton() -> None:
    """Passes the log records of the plain modules on to the server's log."""
    logging.basicConfig(handlers=[_TritonLog()], level=logging.INFO, format="%(message)s", force=True)


class _TritonLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log = pb_utils.Logger.log_error if record.levelno >= logging.ERROR else pb_utils.Logger.log_warn
        (pb_utils.Logger.log_info if record.levelno < logging.WARNING else log)(self.format(record))


def input_tensors(request: object, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of the inputs that a request has, of those in `names`."""
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
