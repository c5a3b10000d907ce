"""The audit log: one line of JSON for each job that is taken and for each that ends, with who asked and what for."""

from __future__ import annotations

import json
import logging
from typing import Any

logger = logging.getLogger(__name__)


def audit(event: str, **facts: Any) -> None:
    """Write one line at INFO. Pictures and prompts stand there as digests alone."""
    logger.info("%s", json.dumps({"event": event, **facts}, ensure_ascii=True, sort_keys=True))
