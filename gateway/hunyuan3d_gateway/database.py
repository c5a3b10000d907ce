"""The database: tables, and transactions on threads. SQLite for one machine, PostgreSQL for several gateways."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sql

T = TypeVar("T")
_THREADS = 4
_BUSY_S = 30.0
_LOCK = 0x68336467  # an arbitrary number: PostgreSQL's advisory lock for the transactions that must not run side by side

metadata = sql.MetaData()
jobs = sql.Table(
    "jobs",
    metadata,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("caller", sql.String(80), nullable=False),
    sql.Column("interface", sql.String(16), nullable=False),
    sql.Column("idempotency_key", sql.String(128)),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("state", sql.String(12), nullable=False),
    sql.Column("stop_as", sql.String(12)),  # the final state that somebody asked for while the job runs
    sql.Column("prompt", sql.Text, nullable=False),
    sql.Column("pictures", sql.Integer, nullable=False),
    sql.Column("options", sql.JSON, nullable=False),
    sql.Column("format", sql.String(8), nullable=False),
    sql.Column("created_at", sql.Double, nullable=False),
    sql.Column("started_at", sql.Double),
    sql.Column("finished_at", sql.Double),
    sql.Column("expires_at", sql.Double),
    sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("owner", sql.String(32)),
    sql.Column("lease_until", sql.Double),
    sql.Column("progress", sql.JSON, nullable=False),
    sql.Column("made", sql.JSON),
    sql.Column("failure", sql.JSON),
    sql.UniqueConstraint("caller", "idempotency_key"),
    sql.Index("jobs_by_state", "state", "created_at"),
    sql.Index("jobs_by_caller", "caller", "created_at"),
)
callers = sql.Table(
    "callers",
    metadata,
    sql.Column("id", sql.String(80), primary_key=True),
    sql.Column("last_claim", sql.Double, nullable=False),
)
keys = sql.Table(
    "keys",
    metadata,
    sql.Column("name", sql.String(64), primary_key=True),
    sql.Column("sha256", sql.String(64), nullable=False, unique=True),
    sql.Column("created_at", sql.Double, nullable=False),
)


class Database:
    """Transactions on a few threads, because drivers and disks block. Raises sqlalchemy.exc.SQLAlchemyError."""

    def __init__(self, url: str) -> None:
        self._sqlite = url.startswith("sqlite")
        if self._sqlite:
            self.engine = sql.create_engine(url, connect_args={"timeout": _BUSY_S}, pool_size=_THREADS)
            sql.event.listen(self.engine, "connect", _prepare)
            sql.event.listen(self.engine, "begin", _begin)
        else:
            self.engine = sql.create_engine(url, pool_pre_ping=True, pool_size=_THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")

    def create(self) -> None:
        """Make the tables that are missing."""
        with self.engine.begin() as connection:
            self.alone(connection)
            metadata.create_all(connection)

    def alone(self, connection: sql.Connection) -> None:
        """Wait until no other transaction that called this runs. SQLite's writing transactions are alone anyway."""
        if not self._sqlite:
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))

    async def run(self, work: Callable[[sql.Connection], T]) -> T:
        """What `work` returns, in a transaction that is committed unless it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.run_here, work)

    async def read(self, work: Callable[[sql.Connection], T]) -> T:
        """run() for work that changes nothing, which waits for no other transaction."""

        def reading() -> T:
            with self.engine.connect().execution_options(reading=True) as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, reading)

    def run_here(self, work: Callable[[sql.Connection], T]) -> T:
        """run() on the thread of the caller."""
        with self.engine.begin() as connection:
            return work(connection)

    def now(self, connection: sql.Connection) -> float:
        """Seconds since 1970 by one clock for all gateways of a database: PostgreSQL's, or that of SQLite's machine."""
        if self._sqlite:
            return time.time()
        found: float = connection.execute(sql.select(sql.extract("epoch", sql.func.clock_timestamp()))).scalar_one()
        return float(found)

    def close(self) -> None:
        """Wait for running transactions and close the connections."""
        self._threads.shutdown()
        self.engine.dispose()


def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin by _begin, not by the driver's guesses
    # FULL: a job that was accepted is still there after a power failure.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={int(_BUSY_S * 1000)}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sql.Connection) -> None:
    # IMMEDIATE: a transaction that reads and then writes cannot find that another one wrote between.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reading") else "BEGIN IMMEDIATE")
