"""Many pictures: a bounded number in flight, each result written whole or not at all, and a ledger from which a run resumes."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import contract, requests
from .batch_inputs import Item, Shard, items_of
from .dns_transport import DnsTransport
from .errors import Cancelled, Hunyuan3DError, ModelNotReady, Overloaded, ServerUnavailable, invalid
from .files import atomic_path
from .ledger import Entry, Ledger, entries
from .mesh import Mesh
from .options import LATENTS_FORMAT, MESHING, SAMPLING
from .pictures import image_inputs
from .round_robin import RoundRobin
from .streams import last
from .transport import ModelInfo

if TYPE_CHECKING:
    from .client import AsyncClient

# A server that restarts answers with these errors for a while. An item is sent again after pauses of 0.5, 1, 2, ... s, about a minute in all.
_PASSING = (Overloaded, ServerUnavailable, ModelNotReady)
_ATTEMPTS = 9
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_USUAL_BATCH = 8  # of a server that does not tell its sampler's settings


@dataclasses.dataclass
class Summary:
    """How far a batch has come: inputs of this shard, results of this run, results of earlier runs, and failures by name."""

    total: int
    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


async def result(client: AsyncClient, image: Any, options: Mapping[str, Any]) -> Mesh | npt.NDArray[Any]:
    """What a batch makes of one picture: a mesh, or latents if that is the `format`."""
    if options["format"] != LATENTS_FORMAT:
        mesh = await last(client.generate_stream(image, **options, preview_every=0))
        assert isinstance(mesh, Mesh)  # the stream of a decode raises ModelFailed otherwise
        return mesh
    step = await last(client._picture_stream(image, {**options, "preview_every": 0}))
    assert step.latents is not None  # a trajectory's last step always has them
    return step.latents


def write(path: Path, made: Mesh | npt.NDArray[Any]) -> None:
    """Write what `result` made, whole or not at all."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        if isinstance(made, Mesh):
            file.write(made.data)
        else:
            np.save(file, made)
        file.flush()
        os.fsync(file.fileno())


async def _ended(futures: Sequence[asyncio.Future[None]]) -> None:
    """Wait until all have ended, however. Cancellations meanwhile do not cut this short: the last one is raised at the end."""
    cancelled = None
    while waiting := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
    for future in futures:
        if not future.cancelled():
            future.exception()  # asyncio reports errors that nobody looked at
    if cancelled is not None:
        raise cancelled


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the ledger gives them back: Python's numbers and lists in place of NumPy's and of tuples."""
    found: dict[str, Any] = json.loads(json.dumps(dict(options), default=lambda value: np.asarray(value).tolist()))
    return found


def _check_format(format: str, named: Mapping[str, Any]) -> None:
    known = (*contract.MESH_FORMATS, LATENTS_FORMAT)
    if format not in known:
        raise invalid("format", " or ".join(known), repr(format), f"leave it out for {known[0]}")
    if format == LATENTS_FORMAT and (meshing := [name for name in MESHING if name in named]):
        raise invalid("format", f"that of a mesh beside {', '.join(meshing)}", repr(format), "leave out format")
    requests.check_meshing(named)


class Batch:
    """One run. `options` are those of AsyncClient.generate_many. Raises InvalidInput before anything is sent."""

    def __init__(self, client: AsyncClient, pictures: Any, out: Path, options: dict[str, Any]) -> None:
        self._resume, self._concurrency, self._on_error, shard, self._progress = (
            options.pop(name) for name in ("resume", "concurrency", "on_error", "shard", "progress")
        )
        if self._on_error not in ("record", "raise"):
            raise invalid("on_error", "record or raise", repr(self._on_error), "record goes on and writes the error down")
        if self._concurrency is not None and self._concurrency < 1:
            raise invalid("concurrency", "at least 1", self._concurrency, "leave it out for what the servers take")
        self._prefix = options.pop("request_id") or uuid.uuid4().hex[:12]
        client._call(options["timeout_s"], request_id=self._id(""), headers=options["headers"])  # checks them
        self._client, self._out, self._options = client, out, options
        named = {name: value for name, value in options.items() if name in (*SAMPLING, *MESHING) and value is not None}
        _check_format(options["format"], named)
        self._suffix, self._named = f".{options['format']}", _plain(named)
        self._shard = Shard.of(shard)
        self._items = [item for item in items_of(pictures, self._named) if self._shard.holds(item.name)]
        for item in self._items:
            _check_format(options["format"], item.options)
        self._summary = Summary(len(self._items))
        self._queue = collections.deque((item, 1) for item in self._items)
        self._workers: set[asyncio.Task[None]] = set()
        self._writing: set[asyncio.Future[None]] = set()

    async def run(self) -> Summary:
        """Do what is not yet done. Cancelling leaves whole results and a ledger that resumes."""
        started = time.monotonic()
        with Ledger(self._out, str(self._shard)) as self._ledger:
            self._known = await asyncio.to_thread(entries, self._out) if self._resume else {}
            await asyncio.to_thread(self._sweep)
            try:
                if self._queue:
                    count = min(self._concurrency or await self._capacity(), len(self._queue))
                    await self._require_models()
                    self._workers = {asyncio.create_task(self._work()) for _ in range(count)}
                    await asyncio.gather(*self._workers)
            finally:
                for worker in self._workers:
                    worker.cancel()
                await _ended([*self._workers, *self._writing])
        self._summary.seconds = time.monotonic() - started
        return self._summary

    async def _capacity(self) -> int:
        """How many requests keep the servers busy: two batches of each, one that runs and one that is prepared."""
        told = (await self._told(contract.SAMPLER)).parameters
        batch, most = (int(told.get(name, _USUAL_BATCH)) for name in ("max_batch", "max_trajectories"))
        transport = self._client.transport
        servers = len(transport.servers) if isinstance(transport, (RoundRobin, DnsTransport)) else 1
        return servers * max(1, min(2 * batch, most))

    async def _require_models(self) -> None:
        """Without them every picture would fail, each after a minute. Raises ModelNotReady."""
        await self._told(contract.IMAGE_CONTEXT)
        if self._options["format"] != LATENTS_FORMAT:
            try:
                await self._told(contract.MESH)
            except ModelNotReady as error:
                hint = f"deploy a shape decoder: hunyuan3d-export vae; for latents alone: format={LATENTS_FORMAT}"
                message = f"{contract.MESH} must be ready on the server for meshes, got no such model\nhint: {hint}"
                raise ModelNotReady(message, status=error.status, model=contract.MESH) from error

    async def _told(self, model: str) -> ModelInfo:
        return await self._client.model_info(model, timeout_s=self._options["timeout_s"], headers=self._options["headers"])

    async def _work(self) -> None:
        while self._queue:
            item, attempt = self._queue.popleft()
            try:
                await self._one(item, attempt)
            except _PASSING as error:
                if attempt >= _ATTEMPTS:
                    await self._failed(item, attempt, error)
                    continue
                self._queue.append((item, attempt + 1))
                if isinstance(error, Overloaded) and sum(not worker.done() for worker in self._workers) > 1:
                    return  # the servers take less than that many at a time
                await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)))
            except Cancelled:
                raise  # the client was closed, which is no failure of the picture
            except (Hunyuan3DError, OSError) as error:
                await self._failed(item, attempt, error)

    async def _one(self, item: Item, attempt: int) -> None:
        named = {**self._named, **_plain(item.options)}
        views = list((await asyncio.to_thread(image_inputs, item.image))[contract.IMAGE.name])
        digest = hashlib.sha256(b"".join(hashlib.sha256(view).digest() for view in views)).hexdigest()
        output = f"{item.name}{self._suffix}"
        known = self._known.get(item.name)
        if known is not None and known.is_of(digest, named, output) and (self._out / output).exists():
            self._summary.skipped += 1
            await self._tell()
            return
        started = time.monotonic()
        request_id = self._id(item.name)
        made = await result(self._client, views, {**self._options, **item.options, "request_id": request_id})
        entry = Entry(item.name, output, digest, named, round(time.monotonic() - started, 3), request_id, attempt)
        await self._finish(functools.partial(self._keep, entry, made))
        self._summary.done += 1
        await self._tell()

    def _keep(self, entry: Entry, made: Mesh | npt.NDArray[Any]) -> None:
        write(self._out / entry.output, made)
        self._ledger.add(entry)

    async def _failed(self, item: Item, attempt: int, error: Exception) -> None:
        if self._on_error == "raise":
            raise error
        told = {"type": type(error).__name__, "message": str(error)}
        named = {**self._named, **_plain(item.options)}
        entry = Entry(item.name, f"{item.name}{self._suffix}", "", named, 0.0, self._id(item.name), attempt, told)
        await self._finish(functools.partial(self._ledger.add, entry))
        self._summary.failed[item.name] = f"{type(error).__name__}: {error}"
        await self._tell()

    async def _finish(self, write_down: Callable[[], None]) -> None:
        """Write a result and its entry, both even if the batch is cancelled meanwhile."""
        # A future and not a task, which a loop that ends would cancel while its thread goes on.
        writing = asyncio.get_running_loop().run_in_executor(None, write_down)
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        await asyncio.shield(writing)

    async def _tell(self) -> None:
        if self._progress is not None:
            await asyncio.to_thread(self._progress, self._summary)

    def _id(self, name: str) -> str:
        return f"{self._prefix}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"

    def _sweep(self) -> None:
        """Remove what a killed run of this shard left half-written."""
        own = {self._out / f"{item.name}{self._suffix}" for item in self._items}
        for partial in self._out.rglob(".*.partial"):
            name = partial.name[1:].rpartition(".partial")[0].rpartition(".")[0]
            if partial.with_name(name) in own:
                partial.unlink(missing_ok=True)
