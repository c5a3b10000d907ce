"""TensorRT's messages. Warnings and errors go to logging; errors are also kept for the exception that follows them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .api import TensorRT

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)

# A library uses its first logger for the whole process and ignores later ones, so each library keeps one Log.
_logs: dict[str, Log] = {}


class Log:
    """One library's log. errors: the error messages since log_of() was last called for the library."""

    def __init__(self, trt: TensorRT) -> None:
        self.errors: list[str] = []
        self.logger = _logger(trt, self.errors)

    def reasons(self) -> str:
        """The first five errors, one on each line."""
        return "\n  ".join(self.errors[:5]) or "no reason given"


def log_of(trt: TensorRT) -> Log:
    """The library's log, emptied of earlier errors."""
    if trt.__version__ not in _logs:
        _logs[trt.__version__] = Log(trt)
    log = _logs[trt.__version__]
    log.errors.clear()
    return log


def _logger(trt: TensorRT, errors: list[str]) -> tensorrt.ILogger:
    if TYPE_CHECKING:
        from tensorrt import ILogger
    else:
        ILogger = trt.ILogger

    class Logger(ILogger):
        def __init__(self) -> None:
            ILogger.__init__(self)

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if severity in (ILogger.ERROR, ILogger.INTERNAL_ERROR):
                errors.append(msg)
            if severity != ILogger.VERBOSE and severity != ILogger.INFO:
                logger.warning("tensorrt: %s", msg)

    return Logger()
