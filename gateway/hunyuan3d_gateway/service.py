"""What the interfaces need of the gateway: take a job, follow it, stop it, give its mesh. They know nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import sqlalchemy.exc

from . import conversion
from .abilities import Abilities, Servers
from .audit import audit
from .board import Board
from .failures import Refused, refused
from .job_queue import JobQueue, New
from .jobs import ID, Job, Progress, State, Wanted, new_id, picture_name, result_name
from .pace import Pace
from .runner import Runner
from .store import Store

_LOOK_S = 0.5  # how soon the change of a job of another gateway is seen
_LONGEST_LOOK_S = 3.0  # for callers that wait for the end alone
_EVICTED = 8
_USUAL_RETRY_S = 10.0


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who asks: a key's name or an address. keyed: whether keys are in use, so that jobs of others are hidden."""

    id: str
    keyed: bool = False


class Service:
    """The one way from the interfaces to jobs. Its methods raise Refused."""

    def __init__(self, *, queue: JobQueue, store: Store, board: Board, runner: Runner, servers: Servers, pace: Pace) -> None:
        self._queue = queue
        self._store = store
        self._board = board
        self._runner = runner
        self._servers = servers
        self._pace = pace
        self.closing = False  # the gateway is about to end: streams of changes end, and their readers come back later

    @property
    def model(self) -> str:
        """The name of the served preset; empty until a server has told it."""
        return self._runner.model

    async def abilities(self) -> Abilities:
        """What the servers can make."""
        return await self._servers.abilities()

    async def submit(self, wanted: Wanted, caller: Caller, *, idempotency_key: str | None = None) -> Job:
        """A new job; or, for an idempotency key that the caller used for the same request before, that job."""
        _check(wanted, await self._servers.abilities())
        digest = _digest(wanted)
        if idempotency_key and (known := await self._queue.find(caller.id, idempotency_key)):
            return _same(*known, digest)
        id = new_id()
        new = New(
            id=id, caller=caller.id, interface=wanted.interface, prompt=wanted.prompt, pictures=len(wanted.pictures),
            options=dict(wanted.options), format=wanted.format, digest=digest, idempotency_key=idempotency_key,
        )  # fmt: skip
        names = [picture_name(id, view) for view in range(new.pictures)]
        try:
            await self._keep(dict(zip(names, wanted.pictures, strict=True)))
            await self._queue.add(new)
        except BaseException as error:
            await asyncio.to_thread(self._store.remove, names)
            if isinstance(error, Refused) and error.status == 429:
                error.retry_after_s = min(3600.0, self._pace.job_s or _USUAL_RETRY_S)
            if isinstance(error, sqlalchemy.exc.IntegrityError) and idempotency_key:  # a twin of this request was quicker
                known = await self._queue.find(caller.id, idempotency_key)
                if known is not None:
                    return _same(*known, digest)
            raise
        audit("taken", job=id, caller=caller.id, interface=wanted.interface, digest=digest, options=dict(wanted.options))
        self._runner.wake()
        return await self._require(id)

    async def _keep(self, files: Mapping[str, bytes]) -> None:
        """Write pictures into the store; old results make room for them."""
        size = sum(map(len, files.values()))
        while not await asyncio.to_thread(self._store.fits, size):
            gone = await self._queue.evict(_EVICTED)
            if not gone:
                raise refused(
                    507, "store_full", "The store of this gateway is full.", "Try again when running jobs have ended."
                )
            await asyncio.to_thread(self._store.remove, [name for job in gone for name in job.files])
        for name, data in files.items():
            await asyncio.to_thread(self._store.write, name, data)

    async def get(self, id: str, caller: Caller) -> Job:
        """A job of the caller, with its latest progress."""
        job = await self._require(id)
        if caller.keyed and job.caller != caller.id:
            raise _unknown()
        return job

    async def _require(self, id: str) -> Job:
        job = await self._queue.get(id) if ID.fullmatch(id) else None
        if job is None:
            raise _unknown()
        live = self._board.get(id)
        return job if live is None or job.state.final else dataclasses.replace(job, progress=live)

    async def jobs_of(self, caller: Caller, *, limit: int, after: str | None, newest_first: bool) -> list[Job]:
        """Jobs of the caller."""
        found = await self._queue.jobs_of(caller.id, limit=limit, after=after, newest_first=newest_first)
        if found is None:
            raise refused(404, "not_found", "No job of yours has the id that `after` names.", "Leave `after` out.")
        return found

    async def changes(self, id: str, caller: Caller) -> AsyncGenerator[Job, None]:
        """The job now and after each change, until it has ended."""
        seen, job = None, await self.get(id, caller)
        while True:
            if job.state is State.QUEUED:
                job = dataclasses.replace(job, progress=await self._queued(job))
            if (now := (job.state, job.progress)) != seen:
                seen = now
                yield job
            if job.state.final or self.closing:
                self._board.wake(id)
                return
            await self._board.change(id, _LOOK_S)
            live = self._board.get(id)
            if live is not None and job.state is State.RUNNING:
                job = dataclasses.replace(job, progress=live)
            else:
                job = await self.get(id, caller)

    async def _queued(self, job: Job) -> Progress:
        ahead = await self._queue.ahead(job)
        return Progress("queued", step=ahead, left_s=self._pace.wait_s(ahead, self._runner.capacity))

    async def wait(self, id: str, caller: Caller) -> Job:
        """The job when it has ended."""
        pause = _LOOK_S
        while not (job := await self.get(id, caller)).state.final:
            await self._board.end(id, pause)
            pause = min(2 * pause, _LONGEST_LOOK_S)
        self._board.wake(id)
        return job

    async def stop(self, id: str, caller: Caller, final: State) -> Job:
        """End a job as cancelled or deleted. The server stops within one step where this gateway runs the job."""
        job = await self.get(id, caller)
        state = await self._queue.stop(id, final)
        if state is State.RUNNING:
            self._runner.interrupt(id)
        elif state is State.DELETED:
            await asyncio.to_thread(self._store.remove, job.files)
        self._board.wake(id)
        audit("stopped", job=id, caller=caller.id, wanted=final.value)
        return await self._require(id)

    async def content(self, job: Job, format: str | None = None) -> bytes:
        """The mesh file of a job, in its own format or another one."""
        if job.state is not State.COMPLETED or job.made is None:
            raise refused(404, "not_ready", f"This job has no mesh: it is {job.state.value}.", "Wait until it is completed.")
        wanted, own = format or job.made.format, job.made.format
        try:
            return await asyncio.to_thread(self._store.read, result_name(job.id, wanted))
        except FileNotFoundError:
            if wanted == own:
                raise refused(404, "expired", "The file of this job is gone.", "Make the mesh again.") from None
        data = await self.content(job)
        made = await asyncio.to_thread(conversion.converted, data, own, wanted)
        await asyncio.to_thread(self._store.write, result_name(job.id, wanted), made)
        return made

    async def counts(self) -> dict[str, int]:
        """State -> the number of jobs."""
        return await self._queue.counts()

    async def size_bytes(self) -> int:
        """The size of the store."""
        return await asyncio.to_thread(self._store.size_bytes)


def _check(wanted: Wanted, able: Abilities) -> None:
    """Raises Refused for what the servers cannot make, before anything is queued."""
    if wanted.prompt and wanted.pictures:
        raise refused(422, "two_inputs", "A job takes a picture or a prompt, not both.", "Leave one of them out.")
    if not wanted.prompt and not wanted.pictures:
        raise refused(422, "no_input", "A picture is missing.", "Send one as `image`.")
    if not able.meshes:
        raise refused(
            503,
            "not_deployed",
            "The server has no shape decoder, so it makes no meshes.",
            "The operator can deploy one: hunyuan3d-export vae.",
        )
    if wanted.prompt and not able.prompts:
        raise refused(422, "no_text_stage", "This server makes shapes of pictures, not of words.", "Send a picture.")
    if wanted.pictures and not able.pictures:
        hint = (
            'Send words, such as "two flat tori".'
            if able.prompts
            else "The operator can deploy one: hunyuan3d-export conditioner."
        )
        raise refused(422, "no_picture_stage", "This server has no image encoder, so it takes no pictures.", hint)
    if len(wanted.pictures) > max(1, able.pictures):
        text = f"This server takes {able.pictures} picture{'s' * (able.pictures > 1)} of an object, not {len(wanted.pictures)}."
        raise refused(422, "too_many_views", text, "Send the front view alone.")


def _digest(wanted: Wanted) -> str:
    """What tells two requests apart."""
    pictures = [hashlib.sha256(picture).hexdigest() for picture in wanted.pictures]
    facts: dict[str, Any] = {
        "prompt": wanted.prompt,
        "pictures": pictures,
        "options": dict(wanted.options),
        "format": wanted.format,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _same(job: Job, before: str, digest: str) -> Job:
    if before != digest:
        raise refused(409, "idempotency_key_reused", "This Idempotency-Key stands for another request.", "Use a new key.")
    return job


def _unknown() -> Refused:
    return refused(404, "not_found", "No job has this id; results are kept for a limited time.", "Start a new job.")
