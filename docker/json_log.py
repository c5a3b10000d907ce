"""Turns tritonserver's log on stdin into one JSON object per line on stdout.

The keys are time, level, source and message, and request_id if the line is about a request that has an id.
"""

from __future__ import annotations

import datetime
import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator

# The form of glog's lines: severity, month and day, time, process, file:line] message.
LINE = re.compile(r"(?P<level>[IWEF])\d{4} (?:[\d:.]+) \d+ (?P<source>[^\]]+)\] (?P<message>.*)", re.DOTALL)
# The ways in which the sampler and Triton itself begin a message about a request.
REQUEST = re.compile(r"request '(?P<quoted>[^']*)' failed|request (?P<word>\S+) [a-z]+: |\[request id: (?P<own>[^\]]+)\] ")
NO_ID = {"", "-", "<id_unknown>"}
LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}


def records(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields a record for each line. A line without glog's prefix (a table, a traceback) has the level of the line before."""
    level = "info"
    for line in lines:
        text = line.rstrip("\n")
        if not text:
            continue
        found = LINE.match(text)
        level = LEVELS[found["level"]] if found else level
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        record = {"time": now, "level": level, "source": found["source"] if found else "", "message": _message(found, text)}
        request = REQUEST.match(record["message"])
        name = next((found for found in request.groups() if found is not None), "") if request else ""
        yield record if name in NO_ID else {**record, "request_id": name}


def _message(found: re.Match[str] | None, text: str) -> str:
    message = found["message"] if found else text
    try:  # newer servers write the message as a JSON string
        return str(json.loads(message)) if message.startswith('"') else message
    except json.JSONDecodeError:
        return message


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends with its input, after the server's last line
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for record in records(sys.stdin):
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
