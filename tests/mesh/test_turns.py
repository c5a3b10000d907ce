"""Turns of decodes: so many run, so many wait in order, the others are refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import outcomes
import pytest
from turns import Turns

Load = list[tuple[int, int]]


def made(load: Load, *, running: int = 1, queued: int = 2, timeout_s: float = 60) -> Turns:
    return Turns(running=running, queued=queued, timeout_s=timeout_s, changed=lambda *counts: load.append(counts))


def nothing() -> None:
    pass


async def hold(turns: Turns, name: str, order: list[str], until: asyncio.Event, check: Callable[[], None] = nothing) -> None:
    async with turns.turn(check):
        order.append(name)
        await until.wait()


def test_requests_run_in_the_order_of_their_arrival() -> None:
    load: Load = []

    async def main() -> list[str]:
        turns, order, until = made(load), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(turns, name, order, until)) for name in "abc"]
        await asyncio.sleep(0.01)
        assert order == ["a"] and load[-1] == (1, 2)
        with pytest.raises(outcomes.Overloaded, match=r"1 running and 2 waiting\nhint: "):
            await hold(turns, "d", order, until)
        until.set()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == ["a", "b", "c"]
    assert load[-1] == (0, 0) and max(running for running, _ in load) == 1


def test_a_request_that_nobody_wants_leaves_the_queue() -> None:
    load: Load = []

    async def main() -> None:
        turns, order, until = made(load), [], asyncio.Event()
        first = asyncio.create_task(hold(turns, "a", order, until))
        await asyncio.sleep(0)

        def gone() -> None:
            raise outcomes.Cancelled("the client cancelled")

        with pytest.raises(outcomes.Cancelled):
            await hold(turns, "b", order, until, gone)
        assert load[-1] == (1, 0)
        until.set()
        await first

    asyncio.run(main())
    assert load[-1] == (0, 0)


def test_a_request_waits_only_so_long() -> None:
    async def main() -> None:
        turns, until = made([], timeout_s=0.05), asyncio.Event()
        first = asyncio.create_task(hold(turns, "a", [], until))
        await asyncio.sleep(0)
        with pytest.raises(outcomes.Expired, match=r"must begin within 0.05 s.*\nhint: "):
            await hold(turns, "b", [], until)
        until.set()
        await first

    asyncio.run(main())


def test_a_failing_body_gives_its_place_on() -> None:
    load: Load = []

    async def main() -> None:
        turns = made(load)

        async def failing() -> None:
            async with turns.turn(nothing):
                await asyncio.sleep(0)
                raise ValueError

        found = await asyncio.gather(failing(), failing(), failing(), return_exceptions=True)
        assert [type(error) for error in found] == [ValueError] * 3

    asyncio.run(main())
    assert load[-1] == (0, 0)
