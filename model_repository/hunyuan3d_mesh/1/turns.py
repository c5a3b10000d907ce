"""Turns: at most so many requests run at the same time; further requests wait in the order of their arrival."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable

from outcomes import Expired, Overloaded

_LOOK_S = 0.5  # how often a waiting request looks whether anybody still wants it


class Turns:
    """At most `running` requests have their turn and at most `queued` more wait, each at most `timeout_s`.

    changed(running, waiting) is called whenever one of the two numbers changes.
    """

    def __init__(self, *, running: int, queued: int, timeout_s: float, changed: Callable[[int, int], None]) -> None:
        self._most_running, self._most_queued, self._timeout_s = running, queued, timeout_s
        self._changed = changed
        self._running = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    @contextlib.asynccontextmanager
    async def turn(self, check: Callable[[], None]) -> AsyncIterator[None]:
        """The body runs in its turn. check: raises when nobody wants the request any more; called while it waits.

        Raises Overloaded at once when too many wait, Expired when the turn does not come in time.
        """
        if self._running < self._most_running:
            self._count(1)
        else:
            await self._wait(check)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, check: Callable[[], None]) -> None:
        if len(self._waiting) >= self._most_queued:
            found = f"{self._running} running and {len(self._waiting)} waiting"
            raise Overloaded(f"decodes must fit into the server's queue, got {found}\nhint: try again later")
        loop = asyncio.get_running_loop()
        place, end = loop.create_future(), loop.time() + self._timeout_s
        self._waiting.append(place)
        self._count(0)
        try:
            while not place.done():
                check()
                if loop.time() >= end:
                    raise Expired(
                        f"a decode must begin within {self._timeout_s:g} s, got no turn\n"
                        "hint: try again later, or raise queue_timeout_s in hunyuan3d_mesh's config.pbtxt"
                    )
                await asyncio.wait([place], timeout=min(_LOOK_S, max(0.0, end - loop.time())))
        except BaseException:
            if place.done():
                self._leave()
            else:
                self._waiting.remove(place)
                self._count(0)
            raise

    def _leave(self) -> None:
        """Gives the place of a request that has ended to the one that has waited longest."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
            self._count(0)
        else:
            self._count(-1)

    def _count(self, more: int) -> None:
        self._running += more
        self._changed(self._running, len(self._waiting))
