"""The queue: every change of a job's state, each one transaction. Leases say which gateway runs a job.

A gateway claims a job for lease_s and renews the lease while it works. A job whose lease has passed goes back into the queue, or
fails by name once it was begun `attempts` times. A result counts only if its gateway still holds the lease, so nothing is doubled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sql

from .database import Database, callers, jobs
from .failures import Failure, refused
from .jobs import Job, Made, Progress, State

_LOST = Failure(
    "gateway_lost",
    "The gateway stopped each time while it made this mesh.",
    "Start it again; tell the operator if it happens again.",
)
_FINAL = [state.value for state in State if state.final]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the queue; see Settings."""

    max_queued: int
    max_queued_per_caller: int
    attempts: int
    lease_s: float
    keep_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
    """A job to put into the queue."""

    id: str
    caller: str
    interface: str
    prompt: str
    pictures: int
    options: Mapping[str, Any]
    format: str
    digest: str
    idempotency_key: str | None


@dataclasses.dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat: running jobs that somebody wants stopped, and jobs that this gateway no longer holds."""

    stop: tuple[str, ...]
    lost: tuple[str, ...]


class JobQueue:
    """`owner` is the name of this gateway. Raises sqlalchemy.exc.SQLAlchemyError where the database fails."""

    def __init__(self, database: Database, owner: str, limits: Limits) -> None:
        self._database = database
        self._owner = owner
        self._limits = limits

    async def find(self, caller: str, idempotency_key: str) -> tuple[Job, str] | None:
        """The job that the caller made with this key before, and the digest of what was asked for."""

        def work(connection: sql.Connection) -> tuple[Job, str] | None:
            same = (jobs.c.caller == caller) & (jobs.c.idempotency_key == idempotency_key)
            row = connection.execute(sql.select(jobs).where(same)).mappings().one_or_none()
            return None if row is None else (_job(row), row["digest"])

        return await self._database.read(work)

    async def add(self, new: New) -> None:
        """Put a job into the queue. Raises Refused where the queue is full, IntegrityError for an idempotency key that is taken."""

        def work(connection: sql.Connection) -> None:
            self._database.alone(connection)  # the bounds hold for callers that come at the same time too
            queued = sql.select(sql.func.count()).where(jobs.c.state == State.QUEUED.value)
            total = connection.execute(queued).scalar_one()
            own = connection.execute(queued.where(jobs.c.caller == new.caller)).scalar_one()
            if total >= self._limits.max_queued or own >= self._limits.max_queued_per_caller:
                whose = "you have" if own >= self._limits.max_queued_per_caller else "there are"
                count = own if own >= self._limits.max_queued_per_caller else total
                raise refused(
                    429, "queue_full", f"The queue is full: {whose} {count} jobs waiting.", "Try again a little later."
                )
            if not connection.execute(sql.select(callers.c.id).where(callers.c.id == new.caller)).first():
                self._introduce(connection, new.caller)
            connection.execute(jobs.insert().values(
                **dataclasses.asdict(new), state=State.QUEUED.value, created_at=self._database.now(connection), attempts=0,
                progress=dataclasses.asdict(Progress()),
            ))  # fmt: skip

        await self._database.run(work)

    def _introduce(self, connection: sql.Connection, caller: str) -> None:
        if connection.dialect.name == "sqlite":
            from sqlalchemy.dialects.sqlite import insert
        else:
            from sqlalchemy.dialects.postgresql import insert  # type: ignore[assignment]
        connection.execute(insert(callers).values(id=caller, last_claim=0.0).on_conflict_do_nothing())

    async def claim(self, most: int) -> list[Job]:
        """At most so many queued jobs, which this gateway runs from now on: callers take turns, each with its oldest job."""

        def work(connection: sql.Connection) -> list[Job]:
            self._database.alone(connection)  # two claims side by side would lock callers in different orders
            found: list[Job] = []
            while len(found) < most and (job := self._claim_one(connection)):
                found.append(job)
            return found

        return await self._database.run(work)

    def _claim_one(self, connection: sql.Connection) -> Job | None:
        turn = (
            sql.select(jobs.c.id, jobs.c.caller)
            .join(callers, callers.c.id == jobs.c.caller)
            .where(jobs.c.state == State.QUEUED.value)
            .order_by(callers.c.last_claim, jobs.c.created_at, jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True, of=jobs)
        )
        row = connection.execute(turn).first()
        if row is None:
            return None
        now = self._database.now(connection)
        claimed = {
            "state": State.RUNNING.value,
            "owner": self._owner,
            "lease_until": now + self._limits.lease_s,
            "started_at": now,
        }
        change = jobs.update().where(jobs.c.id == row.id).values(**claimed, attempts=jobs.c.attempts + 1, stop_as=None)
        connection.execute(change)
        connection.execute(callers.update().where(callers.c.id == row.caller).values(last_claim=now))
        return _job(connection.execute(sql.select(jobs).where(jobs.c.id == row.id)).mappings().one())

    async def beat(self, progress: Mapping[str, Progress], running: Sequence[str]) -> Beat:
        """Renew the leases of this gateway's running jobs, write down how far they are, and ask who is to stop."""

        def work(connection: sql.Connection) -> Beat:
            mine = (jobs.c.owner == self._owner) & (jobs.c.state == State.RUNNING.value)
            until = self._database.now(connection) + self._limits.lease_s
            connection.execute(jobs.update().where(mine).values(lease_until=until))
            for id, each in progress.items():
                connection.execute(jobs.update().where(mine & (jobs.c.id == id)).values(progress=dataclasses.asdict(each)))
            held = {row.id: row.stop_as for row in connection.execute(sql.select(jobs.c.id, jobs.c.stop_as).where(mine))}
            return Beat(tuple(id for id, stop in held.items() if stop), tuple(id for id in running if id not in held))

        return await self._database.run(work)

    async def finish(self, job: Job, end: Made | Failure) -> bool:
        """Write down a job's end. False where this gateway no longer holds the job, whose result then counts for nothing."""
        made = end if isinstance(end, Made) else None

        def work(connection: sql.Connection) -> bool:
            held = (jobs.c.id == job.id) & (jobs.c.owner == self._owner) & (jobs.c.attempts == job.attempts)
            held &= (jobs.c.state == State.RUNNING.value) & jobs.c.stop_as.is_(None)
            final = State.FAILED if made is None else State.COMPLETED
            facts = {"failure": dataclasses.asdict(end)} if made is None else {"made": dataclasses.asdict(made)}
            done = self._end(connection, held, final, facts)
            return done == 1

        return await self._database.run(work)

    def _end(self, connection: sql.Connection, which: sql.ColumnElement[bool], final: State, facts: Mapping[str, Any]) -> int:
        now = self._database.now(connection)
        share = 1.0 if final is State.COMPLETED else 0.0
        values = {
            "state": final.value,
            "owner": None,
            "lease_until": None,
            "finished_at": now,
            "expires_at": now + self._limits.keep_s,
        }
        progress = dataclasses.asdict(Progress(final.value, share=share, revision=1 << 30))
        return connection.execute(
            jobs.update().where(which).values(**values, **facts, progress=progress, stop_as=None)
        ).rowcount

    async def stop(self, id: str, final: State) -> State | None:
        """Ask for a job's end as cancelled or deleted; its state then. A running job ends when its gateway hears of it."""

        def work(connection: sql.Connection) -> State | None:
            row = connection.execute(sql.select(jobs.c.state).where(jobs.c.id == id).with_for_update()).first()
            if row is None:
                return None
            state = State(row.state)
            if state is State.QUEUED or (state.final and final is State.DELETED and state is not State.DELETED):
                self._end(connection, jobs.c.id == id, final, {"idempotency_key": None})
                return final
            if state is State.RUNNING:
                connection.execute(jobs.update().where(jobs.c.id == id).values(stop_as=final.value))
            return state

        return await self._database.run(work)

    async def stopped(self, job: Job) -> State | None:
        """Write down that a running job has stopped, as whoever asked for it wanted: the state that it has now."""

        def work(connection: sql.Connection) -> State | None:
            held = (jobs.c.id == job.id) & (jobs.c.owner == self._owner) & (jobs.c.state == State.RUNNING.value)
            wanted = connection.execute(sql.select(jobs.c.stop_as).where(held)).scalar_one_or_none()
            if wanted is None:
                return None
            self._end(connection, held, State(wanted), {"idempotency_key": None})
            return State(wanted)

        return await self._database.run(work)

    async def release(self, ids: Iterable[str]) -> None:
        """Put running jobs of this gateway back into the queue, as if they had not been begun: the gateway is about to end."""

        def work(connection: sql.Connection) -> None:
            mine = (jobs.c.owner == self._owner) & (jobs.c.state == State.RUNNING.value) & jobs.c.id.in_(list(ids))
            back = {"state": State.QUEUED.value, "owner": None, "lease_until": None, "progress": dataclasses.asdict(Progress())}
            connection.execute(jobs.update().where(mine).values(**back, attempts=jobs.c.attempts - 1))

        await self._database.run(work)

    async def recover(self) -> int:
        """Put jobs of gateways that are gone back into the queue, or end them. The number of jobs that were found."""

        def work(connection: sql.Connection) -> int:
            now = self._database.now(connection)
            lost = (jobs.c.state == State.RUNNING.value) & (jobs.c.lease_until < now)
            ended = 0
            for final in (State.CANCELLED, State.DELETED):
                ended += self._end(connection, lost & (jobs.c.stop_as == final.value), final, {"idempotency_key": None})
            again = jobs.c.attempts < self._limits.attempts
            ended += self._end(connection, lost & ~again, State.FAILED, {"failure": dataclasses.asdict(_LOST)})
            back = {"state": State.QUEUED.value, "owner": None, "lease_until": None, "progress": dataclasses.asdict(Progress())}
            return ended + connection.execute(jobs.update().where(lost & again).values(**back)).rowcount

        return await self._database.run(work)

    async def get(self, id: str) -> Job | None:
        """A job by its id."""

        def work(connection: sql.Connection) -> Job | None:
            row = connection.execute(sql.select(jobs).where(jobs.c.id == id)).mappings().one_or_none()
            return None if row is None else _job(row)

        return await self._database.read(work)

    async def jobs_of(self, caller: str, *, limit: int, after: str | None, newest_first: bool) -> list[Job] | None:
        """Jobs of a caller in the order in which they came; None where `after` names none of them."""

        def work(connection: sql.Connection) -> list[Job] | None:
            own = sql.select(jobs).where(jobs.c.caller == caller, jobs.c.state != State.DELETED.value)
            if after is not None:
                start = connection.execute(own.where(jobs.c.id == after)).mappings().one_or_none()
                if start is None:
                    return None
                here, there = sql.tuple_(jobs.c.created_at, jobs.c.id), sql.tuple_(start["created_at"], start["id"])
                own = own.where(here < there if newest_first else here > there)
            order = [column.desc() if newest_first else column.asc() for column in (jobs.c.created_at, jobs.c.id)]
            return [_job(row) for row in connection.execute(own.order_by(*order).limit(limit)).mappings()]

        return await self._database.read(work)

    async def counts(self) -> dict[str, int]:
        """State -> the number of jobs in it."""

        def work(connection: sql.Connection) -> dict[str, int]:
            rows = connection.execute(sql.select(jobs.c.state, sql.func.count()).group_by(jobs.c.state))
            return {state.value: 0 for state in State} | {state: count for state, count in rows}

        return await self._database.read(work)

    async def ahead(self, job: Job) -> int:
        """How many queued jobs came before this one."""

        def work(connection: sql.Connection) -> int:
            before = (jobs.c.state == State.QUEUED.value) & (jobs.c.created_at < job.created_at)
            return int(connection.execute(sql.select(sql.func.count()).where(before)).scalar_one())

        return await self._database.read(work)

    async def expire(self) -> list[Job]:
        """Remove the jobs whose time is over, and return them, so that their files can go."""

        def work(connection: sql.Connection) -> list[Job]:
            over = jobs.c.state.in_(_FINAL) & (jobs.c.expires_at < self._database.now(connection))
            return _remove(connection, over)

        return await self._database.run(work)

    async def evict(self, count: int) -> list[Job]:
        """Remove the jobs that ended first, and return them: the store needs their space."""

        def work(connection: sql.Connection) -> list[Job]:
            oldest = sql.select(jobs.c.id).where(jobs.c.state.in_(_FINAL)).order_by(jobs.c.finished_at).limit(count)
            return _remove(connection, jobs.c.id.in_([row.id for row in connection.execute(oldest)]))

        return await self._database.run(work)

    async def known(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that jobs have."""

        def work(connection: sql.Connection) -> set[str]:
            return {row.id for row in connection.execute(sql.select(jobs.c.id).where(jobs.c.id.in_(list(ids))))}

        return await self._database.read(work)


def _remove(connection: sql.Connection, which: sql.ColumnElement[bool]) -> list[Job]:
    found = [_job(row) for row in connection.execute(sql.select(jobs).where(which)).mappings()]
    connection.execute(jobs.delete().where(jobs.c.id.in_([job.id for job in found])))
    return found


def _job(row: sql.RowMapping) -> Job:
    facts = {field.name: row[field.name] for field in dataclasses.fields(Job)}
    return Job(**facts | {
        "state": State(row["state"]),
        "progress": Progress(**row["progress"]),
        "made": None if row["made"] is None else Made(**row["made"]),
        "failure": None if row["failure"] is None else Failure(**row["failure"]),
    })  # fmt: skip
