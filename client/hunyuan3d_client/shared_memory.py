"""Big tensors for a server on the same host: in files of /dev/shm that both map, instead of through the socket.

A Segment is registered at the server once and carries one request at a time. After the answer, the next request may use it.
If no answer came (the call was cancelled, its deadline passed, the connection broke), the server may still read or write
the segment. Such a segment is unlinked and never used again. It is unregistered minutes later, because servers up to 24.10
crash when a segment in use is unregistered.

The segments of a killed client are treated in the same way. The client's locks (flock) end with its process, so any later
client sees that nobody owns the files, unlinks them at once and unregisters them later.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt

from .deadlines import until
from .transport import Request, StatusError

if sys.platform != "win32":
    import fcntl

THRESHOLD_BYTES = 1 << 19
_FOLDER = Path("/dev/shm")  # where shm_open() makes its files on Linux, the system that Triton runs on
_PREFIX = "hunyuan3d-client-"
_LEAST_BYTES = 1 << 20
# Of one client, segments that only the server still maps included. Beyond it, tensors travel through the socket.
_MOST_BYTES = 1 << 30
_SWEEP_S = 300.0  # longer than a server works on a request that nobody waits for
_ASK_S = 5.0
_REFUSED_S = 60.0  # after a refusal, tensors travel through the socket for this long before the client asks again
_ALIGNMENT = 64
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class Registry(Protocol):
    """The server's list of shared-memory segments. Each method raises StatusError."""

    async def register(self, name: str, size_bytes: int, *, timeout_s: float) -> None: ...

    async def unregister(self, name: str, *, timeout_s: float) -> None: ...

    async def registered(self, *, timeout_s: float) -> set[str]: ...


class Segment:
    """A mapped file of /dev/shm, locked while this process lives. `places` says which bytes hold which tensor.

    Raises OSError where there is no /dev/shm or not enough of it.
    """

    def __init__(self, size_bytes: int) -> None:
        self.name = f"{_PREFIX}{uuid.uuid4().hex}"
        self.size_bytes = size_bytes
        self.places: dict[str, slice] = {}
        self._path = _FOLDER / self.name
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if not os.fstat(self._file).st_nlink:
                raise OSError("another client took the new segment for a dead one's")
            # Take the memory now, because a write into a full /dev/shm would kill the process (SIGBUS).
            os.posix_fallocate(self._file, 0, size_bytes)
            self._map = mmap.mmap(self._file, size_bytes)
        except BaseException:
            os.close(self._file)
            self._path.unlink(missing_ok=True)
            raise

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        np.ndarray(array.shape, array.dtype, self._map, self.places[name].start)[...] = array

    def read(self, name: str) -> bytes:
        return self._map[self.places[name]]

    def leave(self) -> None:
        """Unmap and unlink the file. Its memory stays in use as long as the server maps it."""
        self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._file)


class Pool:
    """The segments of one client at one server. With `insist`, a request that cannot get a segment fails."""

    def __init__(self, registry: Registry, *, insist: bool) -> None:
        self._registry = registry
        self._insist = insist
        self._refused_until = -math.inf
        self._idle: list[Segment] = []
        self._in_use: set[Segment] = set()
        self._left: dict[str, int] = {}  # name -> size of each segment that the server still maps
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    async def take(self, request: Request, *, timeout_s: float) -> Segment | None:
        """A segment with a place for each big tensor of `request`.

        None if the request has no big tensor, or if memory cannot be had and this pool does not insist. Raises StatusError if
        this pool insists and the server is gone or refuses.
        """
        places, size_bytes = _places(request)
        if not places:
            return None
        try:
            segment = self._fitting(size_bytes) or await self._make(size_bytes, until(timeout_s))
        except OSError as error:
            if not self._insist:
                return None
            refusal = error.__cause__
            if isinstance(refusal, StatusError) and refusal.status in GONE:
                raise refusal from refusal.__cause__  # as the server gave it, without the OSError around it
            message = f"shared_memory must be usable with this server, got {error}\nhint: shared_memory='auto' can go without"
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, message) from error
        segment.places = places
        return segment

    def give_back(self, segment: Segment, *, landed: bool) -> None:
        """Take a segment back from a request. `landed`: the server has answered and no longer uses the segment."""
        self._in_use.remove(segment)
        if landed and not self._closed:
            self._idle.append(segment)
        else:
            self._left[segment.name] = segment.size_bytes
            segment.leave()

    async def knows(self, segment: Segment, *, timeout_s: float) -> bool:
        """Whether the server has `segment` registered. Idle segments that a restarted server does not know are given up."""
        try:
            known = await self._registry.registered(timeout_s=min(timeout_s, _ASK_S))
        except StatusError:
            return True
        for lost in [idle for idle in self._idle if idle.name not in known]:
            self._idle.remove(lost)
            lost.leave()
        return segment.name in known

    async def close(self) -> None:
        """Unregister and unlink the idle segments. Segments in use follow when their requests end."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        with suppress(StatusError):  # a dead server has no segments registered
            for segment in self._idle:
                await self._registry.unregister(segment.name, timeout_s=_ASK_S)
        while self._idle:
            self._idle.pop().leave()

    def _fitting(self, size_bytes: int) -> Segment | None:
        """Take the smallest idle segment that is large enough, if there is one."""
        fitting = min(
            (idle for idle in self._idle if idle.size_bytes >= size_bytes), key=lambda idle: idle.size_bytes, default=None
        )
        if fitting is not None:
            self._idle.remove(fitting)
            self._in_use.add(fitting)
        return fitting

    async def _make(self, size_bytes: int, left: Callable[[], float]) -> Segment:
        """Make a segment and register it, within the time that is `left`. Raises OSError if the server or this host refuses."""
        if time.monotonic() < self._refused_until and not self._insist:
            raise OSError("a refusal")
        size_bytes = max(_LEAST_BYTES, 1 << (size_bytes - 1).bit_length())
        while self._idle and self._held_bytes() + size_bytes > _MOST_BYTES:
            await self._drop(self._idle.pop(0), min(left(), _ASK_S))
        if self._held_bytes() + size_bytes > _MOST_BYTES:
            raise OSError(f"{_MOST_BYTES >> 20} MiB in use")
        segment = Segment(size_bytes)
        self._in_use.add(segment)
        try:
            await self._registry.register(segment.name, size_bytes, timeout_s=min(left(), _ASK_S))
        except BaseException as error:
            self.give_back(segment, landed=False)
            if not isinstance(error, StatusError):
                raise
            # Any status counts as a refusal, UNAVAILABLE too: Triton answers so where the protocol is restricted.
            self._refused_until = time.monotonic() + _REFUSED_S
            raise OSError(f"a refusal: {error}") from error
        if self._sweeper is None:
            for path in _FOLDER.glob(f"{_PREFIX}*"):
                _is_owned(path, or_unlink=True)
            self._sweeper = asyncio.create_task(self._sweep())
        return segment

    def _held_bytes(self) -> int:
        return sum(segment.size_bytes for segment in (*self._idle, *self._in_use)) + sum(self._left.values())

    async def _drop(self, segment: Segment, timeout_s: float) -> None:
        try:
            await self._registry.unregister(segment.name, timeout_s=timeout_s)
        except StatusError:
            self._left[segment.name] = segment.size_bytes
        finally:
            segment.leave()

    async def _sweep(self) -> None:
        """In regular intervals, unregister the segments that nobody owns and that nobody owned one interval ago."""
        before: set[str] = set()
        while True:
            with suppress(StatusError):
                known = await self._registry.registered(timeout_s=_ASK_S)
                dead = {name for name in known if name.startswith(_PREFIX) and not _is_owned(_FOLDER / name)}
                for name in dead & before:
                    await self._registry.unregister(name, timeout_s=_ASK_S)
                    known.remove(name)
                self._left = {name: size for name, size in self._left.items() if name in known}
                before = dead
            await asyncio.sleep(_SWEEP_S)


def _places(request: Request) -> tuple[dict[str, slice], int]:
    """The place of each big tensor in a segment, and the size of the segment.

    Inputs and outputs share the names, because no name is both an input's and an output's.
    """
    sizes = {name: array.nbytes for name, array in request.inputs.items() if array.dtype != np.object_}
    places: dict[str, slice] = {}
    end = 0
    for name, size in {**sizes, **request.output_bytes}.items():
        if size >= THRESHOLD_BYTES:
            places[name] = slice(end, end + size)
            end += -size % _ALIGNMENT + size
    return places, end


def _is_owned(path: Path, *, or_unlink: bool = False) -> bool:
    """Whether a living process holds the lock of a segment's file. A file of another user counts as owned.

    `or_unlink`: unlink the file if nobody owns it.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (
            or_unlink
        ):  # under the lock, for which a client that has just made the file waits; it then sees that the link is gone
            path.unlink(missing_ok=True)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(file)
