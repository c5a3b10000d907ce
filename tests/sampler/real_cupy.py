"""Runs as a program with the real CuPy: prints as JSON what importing it does here, and what the sampler's Arrays then take.

It gets no GPU, a HOME that cannot be written, and CUPY_CACHE_DIR where the test sets it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from types import SimpleNamespace


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.getMessage()}")


def main() -> None:
    messages = _Messages()
    logging.basicConfig(handlers=[messages], level=logging.INFO)
    from arrays import Arrays

    on_gpu = Arrays("auto", SimpleNamespace()).on_gpu
    found = {"uid": os.getuid(), "on_gpu": on_gpu, "messages": messages.texts}
    try:
        cupy = importlib.import_module("cupy")
    except OSError as error:
        found["error"] = type(error).__name__
    else:
        found["version"] = cupy.__version__
        found["functions"] = sorted(name for name in dir(cupy) if not name.startswith("_") and callable(getattr(cupy, name)))
        found["ndarray"] = sorted(dir(cupy.ndarray))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
