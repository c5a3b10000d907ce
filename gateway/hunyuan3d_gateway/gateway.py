"""The parts of a gateway put together, their start and their end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator

from hunyuan3d_client import AsyncClient, Transport
from hunyuan3d_client.environment import Connection

from .abilities import Servers
from .board import Board
from .database import Database
from .failures import Refused
from .generation import Generation, Maker
from .job_queue import JobQueue, Limits
from .keys import Keys
from .metrics import Metrics
from .pace import Pace
from .runner import Runner
from .service import Service
from .settings import Settings
from .store import Store

_ABILITIES_S = 5.0
_CLEANING_S = 20.0
_EVICTED = 8

logger = logging.getLogger(__name__)


class Gateway:
    """One process's gateway. `maker` replaces the servers in tests."""

    def __init__(self, settings: Settings, *, maker: Maker | None = None, servers: Servers | None = None) -> None:
        self.settings = settings
        self.owner = secrets.token_hex(8)
        settings.data.mkdir(parents=True, exist_ok=True)
        self.database = Database(settings.database_url)
        limits = Limits(
            max_queued=settings.max_queued, max_queued_per_caller=settings.max_queued_per_caller,
            attempts=settings.attempts, lease_s=settings.lease_s, keep_s=settings.keep_s,
        )  # fmt: skip
        self.queue = JobQueue(self.database, self.owner, limits)
        self.store = Store(settings.data / "files", most_bytes=settings.store_bytes)
        self.keys = Keys(self.database)
        self.board, self.pace, self.metrics = Board(), Pace(), Metrics()
        self._given = maker, servers

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """The service while the gateway runs."""
        await asyncio.to_thread(self.database.create)
        client = AsyncClient(transport=_transport(self.settings.servers), max_in_flight=256)
        maker, servers = self._given
        self.generation = Generation(
            client, self.board, self.pace, previews=self.settings.previews, preview_resolution=self.settings.preview_resolution
        )
        self.generation.timeout_s = self.settings.job_timeout_s
        self.servers = servers or Servers(client)
        wait_s = self.settings.server_wait_s
        self.runner = Runner(self.queue, self.store, self.board, maker or self.generation, server_wait_s=wait_s)
        self.runner.capacity = self.settings.running or 1
        self.runner.ended = self.metrics.ended
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("abilities", self._ask_forever()), ("claim", self.runner.claim_forever()),
                ("beat", self.runner.beat_forever()), ("clean", self._clean_forever()),
            )
        ]  # fmt: skip
        self.service = Service(
            queue=self.queue, store=self.store, board=self.board, runner=self.runner, servers=self.servers, pace=self.pace
        )
        try:
            yield self.service
        finally:
            await self.runner.drain(self.settings.drain_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()
            await asyncio.to_thread(self.database.close)

    def stop_taking(self) -> None:
        """Take no more jobs from the queue and end the streams of events: the gateway is about to end."""
        if hasattr(self, "runner"):
            self.runner.stop_taking()
            self.service.closing = True

    async def _ask_forever(self) -> None:
        """Keep what depends on the servers up to date."""
        while True:
            try:
                able = await self.servers.abilities()
            except Refused:
                await asyncio.sleep(1.0)
                continue
            self.runner.capacity = self.settings.running or able.capacity
            self.runner.model = able.model
            self.generation.pointed, self.generation.solid = able.prompts, able.solid
            self.generation.usual_steps = able.steps
            self.runner.wake()
            await asyncio.sleep(_ABILITIES_S)

    async def _clean_forever(self) -> None:
        """Take over the jobs of dead gateways, and remove what is over."""
        passed = 0.0
        while True:
            try:
                if await self.queue.recover():
                    self.runner.wake()
                if passed <= 0:
                    await self._clean()
                    passed = _CLEANING_S
            except Exception:  # the loop must go on, whatever the database's driver or the disk raise
                logger.exception("cleaning failed")
            pause = self.settings.lease_s / 3
            await asyncio.sleep(pause)
            passed -= pause

    async def _clean(self) -> None:
        gone = await self.queue.expire()
        while not await asyncio.to_thread(self.store.fits, 0):
            evicted = await self.queue.evict(_EVICTED)
            if not evicted:
                break
            gone += evicted
            await asyncio.to_thread(self.store.remove, [name for job in evicted for name in job.files])
        await asyncio.to_thread(self.store.remove, [name for job in gone for name in job.files])
        old = await asyncio.to_thread(self.store.old_ids)
        known = await self.queue.known(id for id in old if id)
        for id in old.keys() - known:
            for path in old[id]:
                await asyncio.to_thread(path.unlink, missing_ok=True)


def _transport(servers: str) -> Transport:
    """TLS and headers come from the variables HUNYUAN3D_*, as for the command hunyuan3d."""
    return dataclasses.replace(Connection.from_env(), url=servers).transport()
