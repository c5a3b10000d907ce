"""Client: the methods of AsyncClient for code that is not asyncio. A thread of its own runs the event loop.

A Client may be used from any thread. For calls in the background there is concurrent.futures: `pool.submit(client.generate, picture)`
gives a Future of any method, and a stream that one thread reads can be closed by another.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from .background import Loop
from .client import AsyncClient
from .environment import DEFAULT_TIMEOUT_S, Connection, timeout_s_from_env
from .grpc_transport import SharedMemory
from .mesh import Mesh, MeshProgress
from .options import show
from .requests import Step
from .streams import Stream
from .transport import Transport

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _facade(
    run: Callable[[Loop, T], R], method: Callable[Concatenate[AsyncClient, P], T], *, returns: Any = None
) -> Callable[Concatenate[Client, P], R]:
    """A method of Client that calls `method` of its AsyncClient with the same arguments, and turns its result by `run`.

    `returns` is the return type that help() shows, where it differs from the type that `method` shows.
    """

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run(self._loop, method(self._client, *args, **kwargs))

    call.__module__, call.__qualname__ = __name__, f"Client.{method.__name__}"
    signature = inspect.signature(method)
    return show(call, signature.replace(return_annotation=returns or signature.return_annotation))


class Client:
    """The client for code that is not asyncio. Its arguments are AsyncClient's. Close it, or use it in a with block."""

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        transport: Transport | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_in_flight: int = 64,
        retries: int = 2,
        shared_memory: SharedMemory = False,
    ) -> None:
        self._client = AsyncClient(
            url,
            transport=transport,
            timeout_s=timeout_s,
            max_in_flight=max_in_flight,
            retries=retries,
            shared_memory=shared_memory,
        )
        self._loop = Loop(self._client)
        self._end = weakref.finalize(self, self._loop.end)

    @classmethod
    def from_env(cls, *, max_in_flight: int = 64, retries: int = 2) -> Client:
        """A client of the servers that the environment names, see AsyncClient.from_env. Raises InvalidInput, OSError."""
        return cls(
            transport=Connection.from_env().transport(),
            timeout_s=timeout_s_from_env(),
            max_in_flight=max_in_flight,
            retries=retries,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel. Calls in flight, in any thread, raise Cancelled."""
        self._end()

    denoise = _facade(Loop.run, AsyncClient.denoise)
    sample = _facade(Loop.run, AsyncClient.sample)
    stream = _facade(Stream, AsyncClient.stream, returns=Stream[Step])
    condition = _facade(Loop.run, AsyncClient.condition)
    cutout = _facade(Loop.run, AsyncClient.cutout)
    decode = _facade(Loop.run, AsyncClient.decode)
    decode_stream = _facade(Stream, AsyncClient.decode_stream, returns=Stream[MeshProgress | Mesh])
    generate = _facade(Loop.run, AsyncClient.generate)
    generate_stream = _facade(Stream, AsyncClient.generate_stream, returns=Stream[Step | MeshProgress | Mesh])
    _picture_stream = _facade(Stream, AsyncClient._picture_stream, returns=Stream[Step])
    generate_many = _facade(Loop.run, AsyncClient.generate_many)
    health = _facade(Loop.run, AsyncClient.health)
    model_info = _facade(Loop.run, AsyncClient.model_info)
