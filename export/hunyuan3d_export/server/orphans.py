"""No server outlives the process that started it, however that process ends: by kill -9, or cut by a time limit."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 45
# A shell waits for the end of its input, whose other end is this process's: the kernel closes it when this process is gone.
_SCRIPT = """
read -r _
kill -TERM "$1"
left=$3
while [ "$left" -gt 0 ] && kill -0 "$1"; do sleep 1; left=$((left - 1)); done
kill -KILL "-$1"
rm -rf -- "$2"
"""


@contextlib.contextmanager
def ended_with_this_process(group: int, folder: Path, *, grace_s: int = GRACE_S) -> Iterator[None]:
    """While the context is open, the end of this process ends a process group too, and removes the folder.

    Its leader, of the same number, gets SIGTERM and grace_s seconds; then the whole group gets SIGKILL.
    """
    command = ["sh", "-c", _SCRIPT, "orphans", str(group), str(folder), str(grace_s)]
    # A session of its own, so that Ctrl-C in a terminal does not end it; no output, because it may outlive a reader of ours.
    shell = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        shell.kill()  # before its input is closed
        shell.wait()
        assert shell.stdin is not None
        shell.stdin.close()
