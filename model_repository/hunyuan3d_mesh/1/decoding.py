"""From latents to a mesh file: drives surface.extract with the served field. Knows nothing of Triton.

The surface follower says which points it needs next, a wave of them; the waves of all requests share the calls of the field.
What takes long on this machine (refining, marching cubes, writing the file) runs in threads, so that no request waits for
another's.

Axes: L latent tokens, P query points, V vertices, F faces.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from typing import Any, Protocol

import cleaning
import failures
import mesh_files
import numpy as np
import surface
from mesh_request import MeshRequest
from mesh_settings import MeshSettings
from outcomes import Ended, Expired

# The numbers of points of a call. Triton shares a batch only between calls of equal shapes, so each call is padded to one of them.
POINT_BUCKETS = (256, 1024, 4096)
PARTS = ("keys and values", "field", "surface", "file")
DONE = "done"

logger = logging.getLogger(__name__)

Waves = Generator[np.ndarray, np.ndarray, surface.Surface]


class Networks(Protocol):
    """The shape decoder. What keys_values returns is handed to field as it is."""

    async def keys_values(self, latents: np.ndarray, request_id: str) -> Any: ...

    async def field(self, queries: np.ndarray, keys_values: Any, request_id: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a decode is: `refinement` of `refinements` are done, `evaluations` values of the field are known."""

    stage: str
    refinement: int = 0
    refinements: int = 0
    evaluations: int = 0


@dataclasses.dataclass(frozen=True)
class MeshFile:
    """The file of a mesh and what is known about it, as JSON can hold it."""

    data: bytes
    format: str
    statistics: dict[str, Any]


class Sink(Protocol):
    """The client's side of one decode: it hears of each wave."""

    request_id: str

    def progress(self, progress: Progress) -> None: ...


class Observer(Protocol):
    """Counts events for the metrics."""

    def evaluated(self, points: int) -> None: ...

    def waved(self) -> None: ...


class Decoder:
    """Makes meshes with `networks`. threads: where the work of this machine runs, outside of the event loop."""

    def __init__(self, networks: Networks, settings: MeshSettings, observer: Observer, threads: Executor | None = None) -> None:
        self._networks = networks
        self._settings = settings
        self._observer = observer
        self._threads = threads
        self._calls = asyncio.Semaphore(settings.field_calls)

    async def decode(self, latents: np.ndarray, request: MeshRequest, sink: Sink, check: Callable[[], None]) -> MeshFile:
        """The mesh of latents [1, L, 64]. check: raises when the decode must stop; it is called before every call of the field.

        Raises failures.FieldError for a field without a surface, Ended when a network fails or gives NaN, what `check` raises.
        """
        job = _Job(self, request, sink, check)
        try:
            return await job.run(latents)
        except failures.NotFinite as error:  # the networks' fault and not the caller's, although it is a ValueError
            raise Ended(str(error)) from error
        except failures.FieldError:
            raise
        except ValueError as error:  # the request was checked on arrival, so this is a defect of the server
            logger.exception("request %s: the mesh could not be made", sink.request_id)
            raise Ended(f"The mesh could not be made: {error}\nhint: the server's log says more") from error

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def keys_values(self, latents: np.ndarray, request_id: str) -> Any:
        return await self._networks.keys_values(latents, request_id)

    async def values(self, queries: np.ndarray, keys_values: Any, sink: Sink, check: Callable[[], None]) -> np.ndarray:
        """The field [P] float32 at a wave of queries [P, 3], by several calls of at most the largest bucket.

        When a call fails, no further call of the wave begins, and the error is raised once those in flight have ended.
        """
        values = np.empty(len(queries), np.float32)
        rest: Iterator[int] = iter(range(0, len(queries), POINT_BUCKETS[-1]))
        failed: list[BaseException] = []

        async def work() -> None:
            for start in rest:  # all workers take from the same iterator
                part = queries[start : start + POINT_BUCKETS[-1]]
                try:
                    async with self._calls:
                        if failed:
                            return
                        check()
                        found = await self._networks.field(padded(part), keys_values, sink.request_id)
                except BaseException as error:
                    failed.append(error)
                    raise
                values[start : start + len(part)] = found[: len(part)]
                self._observer.evaluated(len(part))

        workers = min(self._settings.field_calls_per_decode, -(-len(queries) // POINT_BUCKETS[-1]))
        await asyncio.gather(*(work() for _ in range(workers)), return_exceptions=True)
        if failed:
            raise failed[0]
        self._observer.waved()
        return values

    @property
    def max_evaluations(self) -> int:
        return self._settings.max_evaluations


class _Job:
    """One decode."""

    def __init__(self, decoder: Decoder, request: MeshRequest, sink: Sink, check: Callable[[], None]) -> None:
        self._decoder, self._request, self._sink, self._check = decoder, request, sink, check
        self._progress = Progress(PARTS[0])
        self._seconds = dict.fromkeys(PARTS, 0.0)

    async def run(self, latents: np.ndarray) -> MeshFile:
        self._check()
        self._tell(stage="keys and values")
        with self._timed("keys and values"):
            keys_values = await self._decoder.keys_values(latents, self._sink.request_id)
        found = await self._follow(keys_values)
        self._check()
        self._tell(stage="file")
        with self._timed("file"):
            data, cleaned = await self._decoder.in_thread(_file, found, self._request)
        return MeshFile(data, self._request.format, self._statistics(found, cleaned))

    async def _follow(self, keys_values: Any) -> surface.Surface:
        """The surface of the field, wave by wave."""
        request = self._request
        waves: Waves = surface.extract(
            request.resolution,
            level=request.level,
            method=request.method,
            max_evaluations=self._decoder.max_evaluations,
            progress=self._refined,
        )
        values: np.ndarray | None = None
        with contextlib.closing(waves):
            while True:
                with self._timed("surface"):
                    queries, found = await self._decoder.in_thread(_next, waves, values)
                if found is not None:
                    return found
                self._tell(stage="field")
                with self._timed("field"):
                    values = await self._decoder.values(queries, keys_values, self._sink, self._check)

    def _refined(self, level: int, levels: int, evaluations: int) -> None:
        """surface.extract calls this in a thread; the next wave tells the client."""
        self._progress = Progress("field", level, levels, evaluations)

    def _tell(self, *, stage: str) -> None:
        self._progress = dataclasses.replace(self._progress, stage=stage)
        self._sink.progress(self._progress)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - began

    def _statistics(self, found: surface.Surface, cleaned: cleaning.Cleaned) -> dict[str, Any]:
        """Counts of the file's mesh, figures of the extraction, the options that were used and the seconds of each part."""
        return {
            **dataclasses.asdict(self._request),
            **dataclasses.asdict(found.statistics),
            "vertices": len(cleaned.vertices),
            "faces": len(cleaned.faces),
            "components": cleaned.components,
            "watertight": cleaned.watertight,
            "removed_components": cleaned.removed,
            "seconds": {part: round(seconds, 4) for part, seconds in self._seconds.items()},
        }


def padded(queries: np.ndarray) -> np.ndarray:
    """Queries [P, 3] with the last one repeated up to the next of POINT_BUCKETS."""
    bucket = next(size for size in POINT_BUCKETS if size >= len(queries))
    return np.pad(queries, ((0, bucket - len(queries)), (0, 0)), mode="edge")


def until(deadline: float, limit_s: float) -> Callable[[], None]:
    """A check that raises Expired after `deadline`, a time of time.monotonic()."""

    def check() -> None:
        if time.monotonic() > deadline:
            hint = "hint: ask for a lower resolution, or raise total_timeout_s in hunyuan3d_mesh's config.pbtxt"
            raise Expired(f"a decode must end within {limit_s:g} s, got further waves\n{hint}")

    return check


def _next(waves: Waves, values: np.ndarray | None) -> tuple[np.ndarray | None, surface.Surface | None]:
    """The next wave, or the surface. In a thread of its own, where a StopIteration cannot leave the function."""
    try:
        return (next(waves) if values is None else waves.send(values)), None
    except StopIteration as end:
        return None, end.value


def _file(found: surface.Surface, request: MeshRequest) -> tuple[bytes, cleaning.Cleaned]:
    """The file, and the mesh in it."""
    limit = request.max_faces or None
    cleaned = cleaning.clean(found.vertices, found.faces, keep=request.keep, max_faces=limit, shape=found.topology)
    return mesh_files.encode(cleaned.vertices, cleaned.faces, request.format), cleaned
