"""An event loop on a thread of its own, for the client of code that is not asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from .client import AsyncClient
from .errors import Cancelled, Hunyuan3DError

R = TypeVar("R")


class Loop:
    """An event loop on a daemon thread. When it ends, it closes the client and cancels the calls that still run.

    Threads do not survive a fork. A call in a forked child therefore starts a new loop; the client says whether it can be used
    there (home.py).
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._ended = asyncio.Event()
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        name = "hunyuan3d-client"
        # The arguments hold no reference to this object, so that a client that is forgotten can end its thread.
        arguments = (_main(self._client, self._ended, started),)
        self._thread = threading.Thread(target=asyncio.run, args=arguments, name=name, daemon=True)
        self._thread.start()
        self._loop = started.result()

    def submit(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        """Start `coroutine` on the loop. Raises Cancelled if the client is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # the loop is closed
            coroutine.close()
            raise Cancelled("client must be open, got a closed one\nhint: keep calls inside its with block") from error

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """The result of `coroutine`. An interrupt of the waiting thread cancels it."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a Client must be called from other threads, got its own\nhint: leave the callback first")
        if os.getpid() != self._process and not self._ended.is_set():
            self._start()
        future = self.submit(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise Cancelled(f"the call was cancelled\nhint: {Cancelled.hint}") from error
        except Hunyuan3DError as error:
            # Raised anew, so that a caller's traceback shows the call and the message, not the frames of the client's own thread.
            raise error.with_traceback(None) from error.__cause__
        except BaseException:
            future.cancel()
            raise

    def end(self) -> None:
        """Close the client. Calls in flight, in any thread, raise Cancelled."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            if threading.current_thread() is not self._thread:
                self._thread.join()


async def _main(
    client: AsyncClient, ended: asyncio.Event, started: concurrent.futures.Future[asyncio.AbstractEventLoop]
) -> None:
    started.set_result(asyncio.get_running_loop())
    await ended.wait()
    await client.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
