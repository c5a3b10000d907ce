"""Client: the methods of AsyncClient for code that is not asyncio. A thread of its own runs the event loop.

A Client may be used from any thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .client import AsyncClient, Latents
from .errors import Cancelled, Hunyuan3DError
from .grpc_transport import SharedMemory
from .mesh import Mesh, MeshProgress
from .options import StreamOptions, show, takes
from .requests import Step
from .transport import Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack  # for type checkers alone: the package does not need it installed

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Loop:
    """An event loop on a daemon thread. When it ends, it closes the client and cancels the calls that still run."""

    def __init__(self, client: AsyncClient) -> None:
        self._ended = asyncio.Event()
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        name = "hunyuan3d-client"
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(client, started),), name=name, daemon=True)
        self._thread.start()
        self._loop = started.result()

    async def _main(self, client: AsyncClient, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._ended.wait()
        await client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def submit(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # the loop is closed
            coroutine.close()
            raise Cancelled("client must be open, got a closed one\nhint: keep calls inside its with block") from error

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a Client must be called from other threads, got its own\nhint: leave the done-callback first")
        future = self.submit(coroutine)
        try:
            return _result(future, None)
        except BaseException:
            future.cancel()
            raise

    def end(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            if threading.current_thread() is not self._thread:
                self._thread.join()


class Job:
    """A trajectory that runs while its caller does other things. `progress` is the latest Step, None before the first."""

    def __init__(self, loop: _Loop, steps: AsyncGenerator[Step, None]) -> None:
        self.progress: Step | None = None
        self._future = loop.submit(self._follow(steps))

    async def _follow(self, steps: AsyncGenerator[Step, None]) -> Latents:
        async with aclosing(steps):
            async for self.progress in steps:
                pass
        assert (
            self.progress is not None and self.progress.latents is not None
        )  # AsyncClient._trajectory raises ModelFailed otherwise
        return self.progress.latents

    def result(self, *, timeout_s: float | None = None) -> Latents:
        """The final latents [B, L, 64].

        Raises TimeoutError if the job has not ended after `timeout_s` (the job goes on then), or the error that ended the job.
        """
        return _result(self._future, timeout_s)

    def cancel(self) -> bool:
        """Stop the trajectory, on the server too. False if the job had already ended."""
        return self._future.cancel()

    def done(self) -> bool:
        """Whether the job has ended, by success, error or cancelling."""
        return self._future.done()

    def add_done_callback(self, callback: Callable[[Job], object]) -> None:
        """Call `callback(job)` when the job ends. The client's own thread calls it, so it must be quick and not use the client."""
        self._future.add_done_callback(lambda _: callback(self))


def _result(future: concurrent.futures.Future[R], timeout_s: float | None) -> R:
    try:
        return future.result(timeout_s)
    except concurrent.futures.CancelledError as error:
        raise Cancelled(f"the call was cancelled\nhint: {Cancelled.hint}") from error
    except Hunyuan3DError as error:
        # Raised anew, so that a caller's traceback shows the call and the message, not the frames of the client's own thread.
        raise error.with_traceback(None) from error.__cause__
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(
            f"the job must end in {timeout_s} s, got no result yet\nhint: raise timeout_s, or ask again"
        ) from error


def _pull(loop: _Loop, answers: AsyncGenerator[R, None]) -> Iterator[R]:
    async def following() -> R | None:
        return await anext(answers, None)

    async def close() -> None:
        await answers.aclose()

    try:
        while (answer := loop.run(following())) is not None:
            yield answer
    finally:
        # Not awaited, because the garbage collector may run these lines on the loop's own thread, which would wait for itself.
        loop.submit(close())


def _facade(
    run: Callable[[_Loop, T], R], method: Callable[Concatenate[AsyncClient, P], T], *, returns: Any = None
) -> Callable[Concatenate[Client, P], R]:
    """A method of Client that calls `method` of its AsyncClient with the same arguments, and turns its result by `run`.

    `returns` is the return type that help() shows, where it differs from the type that `method` shows.
    """

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run(self._loop, method(self._client, *args, **kwargs))

    call.__qualname__ = f"Client.{method.__name__}"
    signature = inspect.signature(method)
    return show(call, signature.replace(return_annotation=returns or signature.return_annotation))


class Client:
    """The client for code that is not asyncio. Its arguments are AsyncClient's. Close it, or use it in a with block."""

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        transport: Transport | None = None,
        timeout_s: float = 300.0,
        max_in_flight: int = 64,
        retries: int = 2,
        shared_memory: SharedMemory = "auto",
    ) -> None:
        self._client = AsyncClient(
            url,
            transport=transport,
            timeout_s=timeout_s,
            max_in_flight=max_in_flight,
            retries=retries,
            shared_memory=shared_memory,
        )
        self._loop = _Loop(self._client)
        self._end = weakref.finalize(self, self._loop.end)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel. Calls in flight, in any thread, raise Cancelled."""
        self._end()

    denoise = _facade(_Loop.run, AsyncClient.denoise)
    sample = _facade(_Loop.run, AsyncClient.sample)
    stream = _facade(_pull, AsyncClient.stream, returns=Iterator[Step])
    condition = _facade(_Loop.run, AsyncClient.condition)
    decode = _facade(_Loop.run, AsyncClient.decode)
    decode_stream = _facade(_pull, AsyncClient.decode_stream, returns=Iterator[MeshProgress | Mesh])
    generate = _facade(_Loop.run, AsyncClient.generate)
    generate_stream = _facade(_pull, AsyncClient.generate_stream, returns=Iterator[Step | MeshProgress | Mesh])
    health = _facade(_Loop.run, AsyncClient.health)
    model_info = _facade(_Loop.run, AsyncClient.model_info)

    @takes(StreamOptions)
    def submit(self, context: Any, **options: Unpack[StreamOptions]) -> Job:
        """Start a trajectory that runs in the background, and return its Job at once. Arguments are those of stream().

        Raises InvalidInput at once. The errors of the trajectory come from the Job's result().
        """
        return Job(self._loop, self._client.stream(context, **options))
