"""Streams of steps that can be closed: AsyncStream for asyncio, Stream for other code."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from .errors import Cancelled, invalid

if TYPE_CHECKING:
    from .background import Loop

T = TypeVar("T")


class AsyncStream(AsyncIterator[T]):
    """What a server sends, piece by piece. Leaving its `async with` block, or aclose(), cancels the request on the server."""

    def __init__(self, pieces: AsyncGenerator[T, None]) -> None:
        self._pieces = pieces

    async def __anext__(self) -> T:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Cancel the request, unless it has ended. Closing twice does no harm."""
        await self._pieces.aclose()

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def last(stream: AsyncStream[T]) -> T:
    """The last piece of a stream that has at least one. The stream is closed then."""
    found: list[T] = []
    async with stream:
        async for piece in stream:
            found = [piece]
    return found[0]


class Stream(Iterator[T]):
    """What a server sends, piece by piece. Leaving its `with` block, or close(), cancels the request on the server.

    close() may be called from any thread; a thread that waits for the next piece then gets Cancelled. Without a `with` block,
    the request is cancelled when the last reference to the stream dies, or when the client closes.
    """

    def __init__(self, loop: Loop, pieces: AsyncStream[T]) -> None:
        self._loop = loop
        self._pieces = pieces
        self._process = os.getpid()
        self._waiting: asyncio.Task[object] | None = None
        self._closed = False

    def __next__(self) -> T:
        if os.getpid() != self._process:
            raise invalid("stream", "read in the process that opened it", "a forked child", "open it after the fork")
        if self._closed:
            raise StopIteration
        try:
            return self._loop.run(self._following())
        except StopAsyncIteration:
            self._closed = True
            raise StopIteration from None

    def close(self) -> None:
        """Cancel the request, unless it has ended. Closing twice does no harm."""
        if not self._closed and os.getpid() == self._process:
            self._closed = True
            with suppress(Cancelled):  # a client that is closed has cancelled its requests
                self._loop.run(self._cancel())

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not awaited, because the garbage collector may run these lines on the loop's own thread, which would wait for itself.
        if not self._closed and os.getpid() == self._process:
            with suppress(Cancelled):
                self._loop.submit(self._cancel())

    async def _following(self) -> T:
        self._waiting = asyncio.current_task()
        try:
            return await anext(self._pieces)
        finally:
            self._waiting = None

    async def _cancel(self) -> None:
        if self._waiting is not None:  # another thread waits for the next piece
            waiting = self._waiting
            waiting.cancel()
            await asyncio.wait({waiting})
        await self._pieces.aclose()
