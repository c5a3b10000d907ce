"""Where a client may be used: in the process and in the event loop of its first call."""

from __future__ import annotations

import asyncio
import os

from .errors import invalid

_grpc_process: int | None = None


class Home:
    """The process and the event loop in which a client was used first. Its channel and its locks belong to both."""

    def __init__(self) -> None:
        self._process: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Raises InvalidInput in a forked child and in another event loop than that of the first call."""
        process, loop = os.getpid(), asyncio.get_running_loop()
        if self._process is None:
            self._process, self._loop = process, loop
        elif process != self._process:
            raise invalid(
                "client", "used in the process of its first call", "a forked child", "make it after the fork, in each worker"
            )
        elif loop is not self._loop:
            raise invalid(
                "AsyncClient",
                "used in the event loop of its first call",
                "another loop",
                "make one inside each asyncio.run(), or use Client, which has a loop of its own",
            )

    def is_elsewhere(self) -> bool:
        """Whether the first call was made in another process or event loop, so that nothing can be closed from here."""
        return self._process is not None and (self._process, self._loop) != (os.getpid(), asyncio.get_running_loop())


def check_grpc() -> None:
    """Raises InvalidInput in a child that was forked after its parent had opened a gRPC channel.

    gRPC's threads do not survive a fork: a channel that the child opened would hang, or crash the child.
    """
    global _grpc_process
    if _grpc_process is None:
        _grpc_process = os.getpid()
    elif _grpc_process != os.getpid():
        raise invalid(
            "gRPC",
            "used by a child alone, or by a parent that does not fork later",
            "a child whose parent called a server before the fork",
            "make the first call after the fork, or start workers by spawn: multiprocessing.get_context('spawn')",
        )
