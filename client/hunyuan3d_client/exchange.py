"""What every call has: a deadline, a slot among those in flight, retries where they are safe, and typed errors."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import grpc

from .errors import (
    BY_STATUS,
    Cancelled,
    DeadlineExceeded,
    Hunyuan3DError,
    ModelFailed,
    ModelNotReady,
    Overloaded,
    ServerUnavailable,
)
from .transport import ModelInfo, Request, StatusError, Tensors, Transport

R = TypeVar("R")
_PROBE_S = 2.0
_FIRST_PAUSE_S = 0.1


class Exchange:
    """Sends requests over a transport, at most `max_in_flight` at a time; the others wait within their deadline."""

    def __init__(self, transport: Transport, *, max_in_flight: int, retries: int) -> None:
        self._transport = transport
        self._slots = asyncio.Semaphore(max_in_flight)
        self._retries = retries
        self._models: dict[str, ModelInfo] = {}
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        await self._transport.close()

    async def infer(self, request: Request, parse: Callable[[Tensors], R], *, deadline: float) -> AsyncGenerator[R, None]:
        """Each answer of `request`, parsed. Closing the generator cancels the request."""

        async def send(timeout_s: float) -> AsyncGenerator[R, None]:
            async with aclosing(self._transport.infer(request, timeout_s=timeout_s)) as answers:
                async for answer in answers:
                    yield parse(answer)

        async with aclosing(self._answers(send, request.model, request.request_id, deadline)) as answers:
            async for answer in answers:
                yield answer

    async def ask(self, query: Callable[[float], Awaitable[R]], *, model: str, deadline: float) -> R:
        """The one answer of `query(timeout_s)`."""

        async def send(timeout_s: float) -> AsyncGenerator[R, None]:
            yield await query(timeout_s)

        async with aclosing(self._answers(send, model, None, deadline)) as answers:
            return await anext(answers)

    async def model(self, name: str, *, deadline: float, fresh: bool = False) -> ModelInfo:
        """What the server says of a model, asked once; again after `fresh`, or after the server refused an input."""
        if fresh or name not in self._models:
            self._models[name] = await self.ask(
                lambda timeout_s: self._transport.model_info(name, timeout_s=timeout_s), model=name, deadline=deadline
            )
        return self._models[name]

    async def _answers(
        self, send: Callable[[float], AsyncGenerator[R, None]], model: str, request_id: str | None, deadline: float
    ) -> AsyncGenerator[R, None]:
        """The answers of `send(timeout_s)`, sent again only if nothing came and the request was refused or not delivered."""
        for attempt in itertools.count(1):
            answered = False
            try:
                await self._take_slot(deadline)
                try:
                    async with aclosing(send(_left_s(deadline))) as answers:
                        async for answer in answers:
                            answered = True
                            yield answer
                    return
                finally:
                    self._slots.release()
            except StatusError as failure:
                error = await self._typed(failure, model, deadline, answered=answered)
            except Hunyuan3DError as own:
                error = own
            except asyncio.CancelledError:
                if not self._closed:
                    raise
                error = Cancelled("client must stay open during a call, got closed\nhint: wait for the call first")
            error.model, error.request_id, error.attempt = model, request_id, attempt
            pause_s = _FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            if isinstance(error, Overloaded):
                error.retry_after_s = pause_s
            if answered or not _safe_to_repeat(error) or attempt > self._retries or time.monotonic() + pause_s >= deadline:
                self._models.pop(model, None)  # the deployment may have changed
                raise error
            await asyncio.sleep(pause_s)

    async def _take_slot(self, deadline: float) -> None:
        if self._closed:
            raise Cancelled("client must be open, got a closed one\nhint: keep calls inside its with block")
        left_s = _left_s(deadline)
        if not self._slots.locked():
            await self._slots.acquire()  # at once; wait_for would cost a task
            return
        try:
            await asyncio.wait_for(self._slots.acquire(), left_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded("the call must start in timeout_s, got no free slot\nhint: raise max_in_flight") from None

    async def _typed(self, failure: StatusError, model: str, deadline: float, *, answered: bool) -> Hunyuan3DError:
        """The error of a failure, by its status and by what the server says of the model; see errors.py."""
        kind = BY_STATUS.get(failure.status, ModelFailed)
        if failure.status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) and time.monotonic() >= deadline:
            kind = DeadlineExceeded  # the server keeps the deadline too, and may be first to act on it
        elif failure.status in (grpc.StatusCode.UNAVAILABLE, None) and not answered:
            try:
                ready = await self._transport.model_ready(model, timeout_s=_PROBE_S)
                kind = ModelNotReady if not ready else Overloaded if failure.status else ModelFailed
            except StatusError:
                kind = ServerUnavailable
        name = failure.status.name if failure.status else "an error without status"
        hint = "" if "\nhint: " in str(failure) else f"\nhint: {kind.hint}"  # the server's own hint knows more
        error = kind(f"{model or 'server'} must answer, got {name}: {failure}{hint}", status=failure.status)
        error.__cause__ = failure
        return error


def _safe_to_repeat(error: Hunyuan3DError) -> bool:
    lost = isinstance(error, ServerUnavailable) and error.status is grpc.StatusCode.UNAVAILABLE
    return lost or isinstance(error, Overloaded)


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded(f"the answer must come in timeout_s, got none\nhint: {DeadlineExceeded.hint}")
    return left_s
