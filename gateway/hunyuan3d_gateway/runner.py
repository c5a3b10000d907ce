"""Runs the jobs that this gateway claims: as many at a time as keep the servers busy, each under a lease."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable

import sqlalchemy.exc

from hunyuan3d_client import Mesh, ModelNotReady, Overloaded, ServerUnavailable

from .audit import audit
from .board import Board
from .failures import Failure, of_error
from .generation import Maker
from .job_queue import JobQueue
from .jobs import Job, Made, State, picture_name, result_name
from .store import Store

_POLL_S = 1.0  # how soon a job is seen that another gateway put into the queue
_BEAT_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_PASSING = (Overloaded, ServerUnavailable, ModelNotReady)

logger = logging.getLogger(__name__)


class Runner:
    """capacity: the number of jobs at a time. ended: is told of each job's end, for the metrics."""

    def __init__(self, queue: JobQueue, store: Store, board: Board, maker: Maker, *, server_wait_s: float) -> None:
        self._queue = queue
        self._store = store
        self._board = board
        self._maker = maker
        self._server_wait_s = server_wait_s
        self.capacity = 1
        self.model = ""
        self.ended: Callable[[Job, str, float], None] = lambda _job, _outcome, _seconds: None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._stopping = False

    @property
    def running(self) -> int:
        """How many jobs run here now."""
        return len(self._tasks)

    def wake(self) -> None:
        """There is a new job in the queue, or room for one."""
        self._wake.set()

    def interrupt(self, id: str) -> None:
        """Stop a job if it runs here; the database must know already why."""
        if (task := self._tasks.get(id)) is not None:
            task.cancel()

    async def claim_forever(self) -> None:
        """Claim jobs while there is room."""
        while not self._stopping:
            free = self.capacity - len(self._tasks)
            try:
                for job in await self._queue.claim(free) if free > 0 else ():
                    self._tasks[job.id] = asyncio.create_task(self._run(job), name=f"job {job.id}")
            except Exception:  # the loop must go on, whatever the database's driver raises
                logger.exception("the database gives no jobs")
                await asyncio.sleep(_POLL_S)
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL_S)
            self._wake.clear()

    async def beat_forever(self) -> None:
        """Renew leases, write progress down, and stop the jobs that are to stop or that another gateway has taken over."""
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                beat = await self._queue.beat(self._board.take_changes(), list(self._tasks))
                for id in (*beat.stop, *beat.lost):
                    self.interrupt(id)
            except Exception:  # without heartbeats other gateways would take the jobs over
                logger.exception("the database takes no heartbeat")

    def stop_taking(self) -> None:
        """Claim no more jobs."""
        self._stopping = True
        self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """Take no more jobs, let the running ones end for a while, and put the others back into the queue."""
        self.stop_taking()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)
        left = dict(self._tasks)
        if left:
            await self._queue.release(left)
            for task in left.values():
                task.cancel()
            await asyncio.wait(left.values())

    async def _run(self, job: Job) -> None:
        started, outcome = time.monotonic(), "stopped"
        try:
            end = await self._made(job, started)
            held = await self._queue.finish(job, end)
            outcome = "lost" if not held else "completed" if isinstance(end, Made) else end.code
            if not held:
                await self._stopped(job)
        except asyncio.CancelledError:
            await asyncio.shield(self._stopped(job))
        except sqlalchemy.exc.SQLAlchemyError:
            logger.exception("the end of job %s could not be written down; it will run again", job.id)
            outcome = "lost"
        finally:
            self._tasks.pop(job.id, None)
            self._board.drop(job.id)
            self.wake()
            seconds = time.monotonic() - started
            self.ended(job, outcome, seconds)
            audit("ended", job=job.id, caller=job.caller, outcome=outcome, attempt=job.attempts, seconds=round(seconds, 3))

    async def _made(self, job: Job, started: float) -> Made | Failure:
        """What came of a job: the facts of its mesh, which is in the store, or why there is none."""
        try:
            names = [picture_name(job.id, view) for view in range(job.pictures)]
            pictures = [await asyncio.to_thread(self._store.read, name) for name in names]
            mesh = await self._patiently(job, pictures)
            digest = await asyncio.to_thread(self._keep, job, mesh)
        except Exception as error:
            failure = of_error(error)
            if failure.code in ("internal", "store_full"):
                logger.exception("job %s failed", job.id)
            else:
                logger.warning("job %s failed: %s", job.id, str(error).partition("\n")[0])
            return failure
        facts = mesh.statistics
        return Made(
            mesh.format, len(mesh.data), digest, int(facts["vertices"]), int(facts["faces"]),
            bool(facts["watertight"]), round(time.monotonic() - started, 3), self.model,
        )  # fmt: skip

    def _keep(self, job: Job, mesh: Mesh) -> str:
        """Write a mesh into the store; its SHA-256."""
        self._store.write(result_name(job.id, mesh.format), mesh.data)
        return hashlib.sha256(mesh.data).hexdigest()

    async def _stopped(self, job: Job) -> None:
        """Write down that a job has stopped; the files of a deleted one go."""
        if await self._queue.stopped(job) is State.DELETED:
            await asyncio.to_thread(self._store.remove, job.files)

    async def _patiently(self, job: Job, pictures: list[bytes]) -> Mesh:
        """The mesh. Servers that are overloaded, gone or loading are tried again for a while."""
        until, pause = time.monotonic() + self._server_wait_s, _FIRST_PAUSE_S
        while True:
            try:
                return await self._maker.make(job, pictures)
            except _PASSING as error:
                if time.monotonic() + pause > until:
                    raise
                logger.info("job %s waits for a server: %s", job.id, str(error).partition("\n")[0])
                self._board.update(job.id, stage="waiting for a server", left_s=None)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
