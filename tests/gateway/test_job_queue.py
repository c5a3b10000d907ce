"""The queue on SQLite and on PostgreSQL: the same tests for both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from hunyuan3d_gateway.database import Database
from hunyuan3d_gateway.failures import Failure, Refused
from hunyuan3d_gateway.job_queue import JobQueue, Limits, New
from hunyuan3d_gateway.jobs import Made, Progress, State, new_id

T = TypeVar("T")
LIMITS = {"max_queued": 1000, "max_queued_per_caller": 1000, "attempts": 2, "lease_s": 60.0, "keep_s": 100.0}
MADE = Made("glb", 3, "00", 8, 12, True, 0.1)


@pytest.fixture
def opened(database: str) -> Iterator[Database]:
    found = Database(database)
    found.create()
    yield found
    found.close()


def queue_of(database: Database, owner: str = "one", **limits: Any) -> JobQueue:
    return JobQueue(database, owner, Limits(**{**LIMITS, **limits}))


def new(caller: str = "a", key: str | None = None) -> New:
    return New(
        id=new_id(), caller=caller, interface="meshes", prompt="torus", pictures=0, options={"seed": 1}, format="glb", digest="d",
        idempotency_key=key,
    )  # fmt: skip


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        return await work()

    return asyncio.run(main())


def test_a_job_goes_from_the_queue_to_its_end(opened: Database) -> None:
    async def work() -> None:
        queue, job = queue_of(opened), new()
        await queue.add(job)
        (claimed,) = await queue.claim(5)
        assert (claimed.id, claimed.state, claimed.attempts, claimed.options) == (job.id, State.RUNNING, 1, {"seed": 1})
        beat = await queue.beat({job.id: Progress("sampling", 3, 50, 0.2, 4.0, 7)}, [job.id])
        assert (beat.stop, beat.lost) == ((), ())
        assert (found := await queue.get(job.id)) and found.progress.step == 3
        assert await queue.finish(claimed, MADE) and not await queue.finish(claimed, MADE)
        assert (found := await queue.get(job.id)) and (found.state, found.made) == (State.COMPLETED, MADE)
        assert await queue.claim(5) == [] and (await queue.counts())["completed"] == 1

    run(work)


def test_callers_take_turns(opened: Database) -> None:
    async def work() -> None:
        queue = queue_of(opened)
        for caller, count in (("a", 6), ("b", 2), ("c", 1)):
            for _ in range(count):
                await queue.add(new(caller))
        order = [(await queue.claim(1))[0].caller for _ in range(9)]
        assert order == ["a", "b", "c", "a", "b", "a", "a", "a", "a"]

    run(work)


def test_a_full_queue_refuses(opened: Database) -> None:
    async def work() -> None:
        queue = queue_of(opened, max_queued=3, max_queued_per_caller=2)
        for caller in ("a", "a", "b"):
            await queue.add(new(caller))
        for caller, words in (("a", "you have 2"), ("c", "there are 3")):
            with pytest.raises(Refused, match=words) as caught:
                await queue.add(new(caller))
            assert caught.value.status == 429

    run(work)


def test_a_dead_gateways_jobs_run_again_and_then_fail_by_name(opened: Database) -> None:
    async def work() -> None:
        dead, alive, job = queue_of(opened, "dead", lease_s=-1.0), queue_of(opened, "alive"), new()
        await dead.add(job)
        (first,) = await dead.claim(1)
        assert await alive.recover() == 1
        (second,) = await alive.claim(1)
        assert second.attempts == 2 and not await dead.finish(first, MADE), "a result of a lost lease counts for nothing"
        assert (await dead.beat({}, [job.id])).lost == (job.id,)
        assert await alive.finish(second, MADE)
        await dead.add(again := new())
        for _ in range(2):
            await dead.claim(1)
            await alive.recover()
        found = await alive.get(again.id)
        assert found and found.state is State.FAILED and found.failure and found.failure.code == "gateway_lost"

    run(work)


def test_a_living_gateway_keeps_its_lease(opened: Database) -> None:
    async def work() -> None:
        queue = queue_of(opened)
        await queue.add(new())
        await queue.claim(1)
        await queue.beat({}, [])
        assert await queue.recover() == 0

    run(work)


@pytest.mark.parametrize("final", [State.CANCELLED, State.DELETED])
def test_jobs_stop_in_every_state(final: State, opened: Database) -> None:
    async def work() -> None:
        queue, waiting, begun = queue_of(opened), new(), new("b")
        await queue.add(waiting)
        assert await queue.stop(waiting.id, final) is final
        assert await queue.claim(1) == []
        await queue.add(begun)
        (job,) = await queue.claim(1)
        assert await queue.stop(job.id, final) is State.RUNNING
        assert (await queue.beat({}, [job.id])).stop == (job.id,)
        assert not await queue.finish(job, MADE), "whoever asked for the end gets it"
        await queue.stopped(job)
        assert (found := await queue.get(job.id)) and found.state is final
        assert await queue.stop(new_id(), final) is None

    run(work)


def test_stopped_jobs_of_dead_gateways_end_as_asked(opened: Database) -> None:
    async def work() -> None:
        dead, job = queue_of(opened, "dead", lease_s=-1.0), new()
        await dead.add(job)
        await dead.claim(1)
        await dead.stop(job.id, State.CANCELLED)
        await queue_of(opened, "alive").recover()
        assert (found := await dead.get(job.id)) and found.state is State.CANCELLED

    run(work)


def test_released_jobs_are_as_if_never_begun(opened: Database) -> None:
    async def work() -> None:
        queue, job = queue_of(opened), new()
        await queue.add(job)
        await queue.claim(1)
        await queue.release([job.id])
        assert (found := await queue.get(job.id)) and (found.state, found.attempts) == (State.QUEUED, 0)

    run(work)


def test_an_idempotency_key_is_taken_once(opened: Database) -> None:
    from sqlalchemy.exc import IntegrityError

    async def work() -> None:
        queue, job = queue_of(opened), new(key="k")
        await queue.add(job)
        with pytest.raises(IntegrityError):
            await queue.add(new(key="k"))
        await queue.add(new("b", key="k"))
        found = await queue.find("a", "k")
        assert found and found[0].id == job.id and await queue.find("a", "other") is None
        await queue.stop(job.id, State.DELETED)
        await queue.add(new(key="k"))

    run(work)


def test_finished_jobs_expire_and_make_room(opened: Database) -> None:
    async def work() -> None:
        queue = queue_of(opened, keep_s=-1.0)
        jobs = [new() for _ in range(3)]
        for job in jobs:
            await queue.add(job)
        for claimed in await queue.claim(2):
            await queue.finish(claimed, Failure("internal", "x"))
        evicted = await queue.evict(1)
        assert [job.id for job in evicted] == [jobs[0].id]
        assert [job.id for job in await queue.expire()] == [jobs[1].id]
        assert await queue.known(job.id for job in jobs) == {jobs[2].id}

    run(work)


def test_gateways_that_claim_at_the_same_time_share_the_jobs(opened: Database) -> None:
    """Many claims side by side: each job is claimed once."""

    async def fill() -> None:
        for index in range(40):
            await queue_of(opened).add(new(f"caller {index % 5}"))

    asyncio.run(fill())

    def claim(owner: int) -> list[str]:
        async def some() -> list[str]:
            queue, found = queue_of(opened, f"owner {owner}"), []
            while jobs := await queue.claim(3):
                found += [job.id for job in jobs]
            return found

        return asyncio.run(some())

    with ThreadPoolExecutor(4) as pool:
        claimed = [id for ids in pool.map(claim, range(4)) for id in ids]
    assert len(claimed) == len(set(claimed)) == 40
