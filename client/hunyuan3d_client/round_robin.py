"""Several servers as one transport: calls take turns among the servers that are up."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import NamedTuple, TypeVar

import grpc

from .deadlines import until
from .errors import invalid
from .transport import Health, ModelInfo, Request, StatusError, Tensors, Transport

R = TypeVar("R")
_ASK_S = 2.0
_PAUSE_S = 0.5


class _Asked(NamedTuple):
    """For a server that is not up and one model: the task that asks whether the model is ready there.

    `first` is set after the server's first answer, or its first failure to answer.
    """

    task: asyncio.Task[None]
    first: asyncio.Event


class RoundRobin:
    """Transports to servers with the same models, as one transport.

    A server joins the turn when it says that the model of a call is ready. A server that answers UNAVAILABLE, or fails without a
    status, leaves the turn at once. It is asked again and again whether it is ready, after a first pause if other servers are up.
    The request that failed there is not repeated here; AsyncClient does that. Questions (model_info, health) are answered by
    the next server in turn. Raises InvalidInput for no server.
    """

    def __init__(self, servers: Sequence[Transport]) -> None:
        if not servers:
            raise invalid("servers", "at least one", "none", "list their addresses")
        self.servers = tuple(servers)
        self._up: deque[Transport] = deque()
        self._any = itertools.cycle(self.servers)
        self._asked: dict[Transport, dict[str, _Asked]] = {}
        self._model = ""  # that of the last call
        self._busy: Counter[Transport] = Counter()  # requests that run, of each server
        self._parting: set[Transport] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def join(self, server: Transport) -> None:
        """Adds a server. It has its first turn when it says that the model of the last call is ready."""
        self.servers = (*self.servers, server)
        self._any = itertools.cycle(self.servers)
        if self._up:  # otherwise the next call asks all servers
            self._leave(server, self._model)

    def part(self, server: Transport) -> None:
        """Takes a server out, which is not the only one. It is closed when its last request has ended."""
        self.servers = tuple(each for each in self.servers if each is not server)
        self._any = itertools.cycle(self.servers)
        if server in self._up:
            self._up.remove(server)
        self._stop_asking(server)
        self._parting.add(server)
        self._close_if_done(server)

    def _close_if_done(self, server: Transport) -> None:
        if server in self._parting and not self._busy[server]:
            self._parting.discard(server)
            del self._busy[server]
            task = asyncio.create_task(server.close())
            self._closing.add(task)  # the loop keeps no strong reference to a task
            task.add_done_callback(self._closing.discard)

    @contextmanager
    def _at_work(self, server: Transport) -> Iterator[None]:
        self._busy[server] += 1
        try:
            yield
        finally:
            self._busy[server] -= 1
            self._close_if_done(server)

    async def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        left = until(timeout_s)
        server = await self._next(request.model, timeout_s)
        try:
            with self._at_work(server):
                async with aclosing(server.infer(request, timeout_s=left())) as answers:
                    async for answer in answers:
                        yield answer
        except StatusError as failure:
            self._note(failure, server, request.model)
            raise

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        return await self._query(name, timeout_s, lambda server, left_s: server.model_ready(name, timeout_s=left_s))

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo:
        return await self._query(name, timeout_s, lambda server, left_s: server.model_info(name, timeout_s=left_s))

    async def health(self, *, timeout_s: float) -> Health:
        return await self._query("", timeout_s, lambda server, left_s: server.health(timeout_s=left_s))

    async def close(self) -> None:
        for server in self.servers:
            self._stop_asking(server)
        await asyncio.gather(*(server.close() for server in (*self.servers, *self._parting)), *self._closing)

    async def _query(self, model: str, timeout_s: float, query: Callable[[Transport, float], Awaitable[R]]) -> R:
        left = until(timeout_s)
        server = await self._next(model, timeout_s)
        try:
            with self._at_work(server):
                return await query(server, left())
        except StatusError as failure:
            self._note(failure, server, model)
            raise

    async def _next(self, model: str, timeout_s: float) -> Transport:
        """The next server that is up. If none is, any server, because its answer says best what is wrong."""
        self._model = model
        if not self._up:
            for server in self.servers:
                self._leave(server, model)
            waiting = {asyncio.create_task(asks[model].first.wait()) for asks in self._asked.values()}
            deadline = time.monotonic() + timeout_s
            try:
                while waiting and not self._up and (left_s := deadline - time.monotonic()) > 0:
                    _, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
        if not self._up:
            return next(self._any)
        self._up.rotate(-1)
        return self._up[-1]

    def _note(self, failure: StatusError, server: Transport, model: str) -> None:
        failure.server = server
        # A server that shuts down may fail without a status. If the server is well after all, it joins again at once.
        if failure.status in (grpc.StatusCode.UNAVAILABLE, None):
            self._leave(server, model)

    def _leave(self, server: Transport, model: str) -> None:
        if server not in self.servers:  # it has parted while its last request ran
            return
        asks = self._asked.setdefault(server, {})
        if model in asks or (asks and self._up):
            return
        pause_s = 0.0
        if server in self._up:
            self._up.remove(server)
            # A server with a full queue, or one that is stopping, says that it is ready and still refuses. The pause gives the
            # other servers their turn first.
            pause_s = _PAUSE_S if self._up else 0.0
        first = asyncio.Event()
        asks[model] = _Asked(asyncio.create_task(self._ask(server, model, first, pause_s)), first)

    async def _ask(self, server: Transport, model: str, first: asyncio.Event, pause_s: float) -> None:
        """After a pause, ask `server` until `model` is ready there, then let the server join the turn."""
        await asyncio.sleep(pause_s)
        while not await _is_ready(server, model):
            first.set()
            await asyncio.sleep(_PAUSE_S)
        self._up.append(server)
        self._stop_asking(server)

    def _stop_asking(self, server: Transport) -> None:
        """End all asking of `server`, whatever the model, because it joins or because the transport closes."""
        for asked in self._asked.pop(server, {}).values():
            asked.first.set()
            if asked.task is not asyncio.current_task():
                asked.task.cancel()


async def _is_ready(server: Transport, model: str) -> bool:
    try:
        return await server.model_ready(model, timeout_s=_ASK_S)
    except Exception:  # of any kind, because the call that comes next meets the same error and raises it
        return False
