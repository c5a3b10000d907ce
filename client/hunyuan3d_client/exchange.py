"""What every call has: a deadline, a slot among the requests in flight, retries where they are safe, and typed errors."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import TypeVar

import grpc

from .calls import Call
from .deadlines import LEAST_S
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
from .headers import of_question
from .home import Home
from .transport import ModelInfo, Request, StatusError, Tensors, Transport

R = TypeVar("R")
Send = Callable[[float], AsyncGenerator[R, None]]  # timeout_s -> the answers of one attempt
logger = logging.getLogger("hunyuan3d_client")
_PROBE_S = 2.0
_FIRST_PAUSE_S = 0.1
# All calls share a budget of retries. Each retry takes 1 from it and each success gives a tenth back, so that a server in
# trouble is not flooded with repeated requests.
_BUDGET = 10.0
_REFUND = 0.1

# What Triton may answer on a stream that it is closing because the deadline has passed.
_OF_A_LATE_STREAM = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, None)


class Exchange:
    """Sends requests over a transport, at most `max_in_flight` at a time. Further requests wait within their deadline."""

    def __init__(self, transport: Transport, *, max_in_flight: int, retries: int) -> None:
        self._transport = transport
        self._slots = asyncio.Semaphore(max_in_flight)
        self._retries = retries
        self._budget = _BUDGET
        self._models: dict[str, ModelInfo] = {}
        self._closed = False
        self._home = Home()

    def is_elsewhere(self) -> bool:
        """Whether the first call was made in another process or event loop; see Home.is_elsewhere."""
        return self._home.is_elsewhere()

    async def close(self) -> None:
        self._closed = True
        if not self.is_elsewhere():  # the channel ended with the event loop, or belongs to the parent of a forked child
            await self._transport.close()

    async def infer(self, request: Request, parse: Callable[[Tensors], R], *, call: Call) -> AsyncGenerator[R, None]:
        """The answers to `request`, each parsed. Closing the generator cancels the request."""

        async def send(timeout_s: float) -> AsyncGenerator[R, None]:
            async with aclosing(self._transport.infer(request, timeout_s=timeout_s)) as answers:
                async for answer in answers:
                    yield parse(answer)

        async with aclosing(self._answers(send, request.model, request.request_id, call)) as answers:
            async for answer in answers:
                yield answer

    async def ask(self, query: Callable[[float], Awaitable[R]], *, model: str, call: Call) -> R:
        """The answer of `query(timeout_s)`, which asks the server about itself or about `model`."""

        async def asked(timeout_s: float) -> R:
            with of_question(call.headers):
                return await query(timeout_s)

        async def send(timeout_s: float) -> AsyncGenerator[R, None]:
            yield await asked(timeout_s)

        return await one(self._answers(send, model, None, call))

    async def model(self, name: str, *, call: Call, fresh: bool = False) -> ModelInfo:
        """What the server says of a model. The answer is remembered until a call of the model fails; `fresh` asks again."""
        if fresh or name not in self._models:
            self._models[name] = await self.ask(
                lambda timeout_s: self._transport.model_info(name, timeout_s=timeout_s), model=name, call=call
            )
        return self._models[name]

    async def _answers(self, send: Send[R], model: str, request_id: str | None, call: Call) -> AsyncGenerator[R, None]:
        """The answers of `send(timeout_s)`.

        `send` is called again only if no answer came and the request was refused or never reached the server. A call without
        a request_id is a question about the server, which needs no slot.
        """
        self._check_usable()
        deadline = call.deadline
        log = _CallLog(model, request_id)
        for attempt in itertools.count(1):
            answered = False
            log.begun(attempt, deadline)
            try:
                async with self._slot(deadline) if request_id else nullcontext(), aclosing(send(left_s(deadline))) as answers:
                    async for answer in answers:
                        answered = True
                        yield answer
                self._budget = min(_BUDGET, self._budget + _REFUND)
                log.answered(attempt)
                return
            except StatusError as failure:
                error = await self._typed(failure, model, call, answered=answered)
            except Hunyuan3DError as own:
                error = own
            except asyncio.CancelledError:
                if not self._closed:
                    raise
                error = Cancelled("the client was closed during the call\nhint: wait for the call first")
            error.model, error.request_id, error.attempt = model, request_id, attempt
            pause_s = _pause_s(error, attempt)
            if isinstance(error, Overloaded):
                error.retry_after_s = pause_s
            if answered or self._spent(attempt, pause_s, deadline) or not _safe_to_repeat(error):
                self._models.pop(model, None)  # another deployment may be the reason for the failure
                log.failed(error, attempt)
                raise error
            self._budget -= 1
            log.repeated(error, pause_s)
            await asyncio.sleep(pause_s)

    def _spent(self, attempt: int, pause_s: float, deadline: float) -> bool:
        """Whether the call's retries, the budget of all calls or the time until `deadline` is used up."""
        return attempt > self._retries or self._budget < 1 or time.monotonic() + pause_s >= deadline

    def _check_usable(self) -> None:
        """Raises Cancelled after close(), and InvalidInput in another process or event loop than that of the first call."""
        if self._closed:
            raise Cancelled("client must be open, got a closed one\nhint: keep calls inside its with block")
        self._home.check()

    @asynccontextmanager
    async def _slot(self, deadline: float) -> AsyncIterator[None]:
        limit_s = left_s(deadline)
        try:
            if self._slots.locked():
                await asyncio.wait_for(self._slots.acquire(), limit_s)
            else:
                await self._slots.acquire()  # a slot is free, and wait_for would cost a task
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded("no slot became free within timeout_s\nhint: raise max_in_flight") from error
        try:
            yield
        finally:
            self._slots.release()

    async def _typed(self, failure: StatusError, model: str, call: Call, *, answered: bool) -> Hunyuan3DError:
        """The client's error for a failure, chosen by its status and by whether the model is ready; see errors.py."""
        kind = BY_STATUS.get(failure.status, ModelFailed)
        if failure.status is grpc.StatusCode.CANCELLED and self._closed:
            kind = Cancelled
        elif failure.status in _OF_A_LATE_STREAM and time.monotonic() >= call.deadline:
            kind = DeadlineExceeded  # the server knows the deadline too and may act on it before the client does
        elif failure.status in (grpc.StatusCode.UNAVAILABLE, None) and not answered:
            try:
                probe_s = max(LEAST_S, min(_PROBE_S, call.deadline - time.monotonic()))
                with of_question(call.headers):
                    ready = await (failure.server or self._transport).model_ready(model, timeout_s=probe_s)
                kind = ModelNotReady if not ready else Overloaded if failure.status else ModelFailed
            except StatusError:
                kind = ServerUnavailable
        name = failure.status.name if failure.status else "an error without status"
        hint = "" if "\nhint: " in str(failure) else f"\nhint: {kind.hint}"  # a hint of the server's own is more precise
        error = kind(f"{model or 'the server'} failed with {name}: {failure}{hint}", status=failure.status)
        error.__cause__ = failure
        # The causes stay for programs; their frames, all inside this client, would bury the message in a traceback of 70 lines.
        for cause in (failure, failure.__cause__):
            if cause is not None:
                cause.__traceback__ = None
        return error


async def one(answers: AsyncGenerator[R, None]) -> R:
    """The only answer of `answers`. Raises ModelFailed if there is no answer, or more than one."""
    async with aclosing(answers):
        found = [answer async for answer in answers]
    if len(found) != 1:
        raise ModelFailed(f"a request must have one answer, got {len(found)}\nhint: {ModelFailed.hint}")
    return found[0]


class _CallLog:
    """Writes the log of one call: how a request ends is a line at INFO; attempts and questions about the server are details."""

    def __init__(self, model: str, request_id: str | None) -> None:
        self._what = f"{model} {request_id}" if request_id else f"a question about {model or 'the server'}"
        self._level_of_end = logging.INFO if request_id else logging.DEBUG
        self._started = time.monotonic()

    def begun(self, attempt: int, deadline: float) -> None:
        logger.debug("%s: attempt %d, %.3f s left", self._what, attempt, deadline - time.monotonic())

    def answered(self, attempt: int) -> None:
        seconds = time.monotonic() - self._started
        logger.log(self._level_of_end, "%s: answered in %.3f s, attempt %d", self._what, seconds, attempt)

    def failed(self, error: Hunyuan3DError, attempt: int) -> None:
        seconds, name = time.monotonic() - self._started, type(error).__name__
        logger.log(self._level_of_end, "%s: %s after %.3f s, attempt %d", self._what, name, seconds, attempt)

    def repeated(self, error: Hunyuan3DError, pause_s: float) -> None:
        logger.debug("%s: %s, sent again in %.3f s", self._what, type(error).__name__, pause_s)


def _pause_s(error: Hunyuan3DError, attempt: int) -> float:
    """The seconds until the next attempt: those that the server told, or else about twice as many as the last time."""
    told_s = error.__cause__.retry_after_s if isinstance(error.__cause__, StatusError) else None
    return told_s or _FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)


def _safe_to_repeat(error: Hunyuan3DError) -> bool:
    if isinstance(error, Overloaded):
        return True
    if isinstance(error, ServerUnavailable) and error.status is grpc.StatusCode.UNAVAILABLE:
        return True
    # The server that failed no longer has the model. (A Triton that shuts down says so to a stream without a status.) Another
    # server of a RoundRobin may have the model.
    gone = isinstance(error, ModelNotReady | ServerUnavailable) and error.status in (grpc.StatusCode.UNAVAILABLE, None)
    return gone and isinstance(error.__cause__, StatusError) and error.__cause__.server is not None


def left_s(deadline: float) -> float:
    """The seconds that are left until `deadline`. Raises DeadlineExceeded if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(f"no answer came within timeout_s\nhint: {DeadlineExceeded.hint}")
    return left
