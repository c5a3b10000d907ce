"""Which requests are stepped, wait, are refused or run out of time; and that none waits for ever, whatever arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from doubles import Counts, Denoiser, Recorder, expected, make_stepper, run_together
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from outcomes import OUTCOMES, Cancelled, Ended, Expired, NoDenoiser, Overloaded, code, outcome
from sample_request import SampleRequest
from stepper import Stepper
from trajectory import Progress, Trajectory

Make = Callable[..., SampleRequest]
WAIT_S = 20.0


def submit(stepper: Stepper, request: SampleRequest, path: str = "guided") -> Recorder:
    sink = Recorder()
    stepper.submit(Trajectory(request, path), sink)
    return sink


async def ended(*sinks: Recorder) -> None:
    await asyncio.wait_for(asyncio.gather(*(sink.ended.wait() for sink in sinks)), WAIT_S)


def test_queued_requests_wait_their_turn_and_then_all_are_done(request_for: Make) -> None:
    denoiser, counts = Denoiser(), Counts()

    async def scenario() -> list[Recorder]:
        stepper = make_stepper(denoiser, counts, max_trajectories=2, max_queued=3)
        sinks = [submit(stepper, request_for(steps=4, seed=seed)) for seed in range(5)]
        assert (stepper.samples, stepper.queued) == (2, 3)
        with pytest.raises(Overloaded, match="within 2 and 3 queued, got 2 and 3 and 1 more\nhint: try again later"):
            submit(stepper, request_for(steps=4))
        assert (stepper.samples, stepper.queued) == (2, 3), "a refused request takes no room"
        await ended(*sinks)
        assert (stepper.samples, stepper.queued) == (0, 0)
        return sinks

    sinks = asyncio.run(scenario())
    assert denoiser.rows == [2, 2, 2, 2, 2, 2, 1, 1, 1] and all(sink.error is None for sink in sinks)
    assert (
        counts.outcomes == ["done"] * 5 and counts.steps == 15 and counts.rows == [("guided", rows) for rows in denoiser.rows]
    )
    assert (counts.active, counts.queued) == (0, 0)


def test_a_refusal_says_when_a_place_will_be_free(request_for: Make) -> None:
    """Four samples of 39 steps take turns in calls of two samples, so that the first are done after 77 calls."""
    denoiser = Denoiser()

    async def scenario() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        stepper = make_stepper(denoiser, max_batch=2, max_trajectories=4, max_queued=0)
        velocity = denoiser.velocity

        async def slow(*arguments: Any) -> np.ndarray:
            await asyncio.sleep(0.01)
            return await velocity(*arguments)

        denoiser.velocity = slow  # type: ignore[method-assign]
        begin = loop.time()
        sinks = [submit(stepper, request_for(steps=40, seed=seed)) for seed in range(4)]
        while len(denoiser.calls) < 8:
            await asyncio.sleep(0.001)
        with pytest.raises(Overloaded, match=r"\nhint: try again in (\d+\.\d) s$") as error:
            submit(stepper, request_for(steps=4))
        told, since = float(str(error.value).split()[-2]), loop.time()
        await ended(*sinks)
        assert loop.time() - begin > 0.7
        return told, loop.time() - since

    told, passed = asyncio.run(scenario())
    assert 0.3 * passed < told < 3 * passed


def test_no_queue(request_for: Make) -> None:
    async def scenario() -> None:
        stepper = make_stepper(Denoiser(), max_trajectories=1, max_queued=0)
        sink = submit(stepper, request_for(steps=3))
        with pytest.raises(Overloaded):
            submit(stepper, request_for(steps=3))
        await ended(sink)
        await ended(submit(stepper, request_for(steps=3)))

    asyncio.run(scenario())


def test_a_request_larger_than_the_active_set_runs_alone(request_for: Make) -> None:
    denoiser = Denoiser()
    large = request_for(batch=9, steps=3)

    async def scenario() -> tuple[Recorder, Recorder, Recorder]:
        stepper = make_stepper(denoiser, max_batch=4, max_trajectories=6, max_queued=10)
        sinks = (submit(stepper, request_for(batch=2, steps=3)), submit(stepper, large), submit(stepper, request_for(steps=3)))
        assert (stepper.samples, stepper.queued) == (2, 10), "the last is not let past the large one"
        await ended(*sinks)
        return sinks

    _, sink, _ = asyncio.run(scenario())
    assert denoiser.rows == [2, 2, 4, 4, 1, 4, 4, 1, 1, 1]
    np.testing.assert_allclose(sink.final, expected(large), rtol=1e-5, atol=1e-6)


def test_the_queue_has_a_time_limit(request_for: Make) -> None:
    counts, release = Counts(), asyncio.Event()

    class Waiting(Denoiser):
        async def velocity(self, path: str, state: dict[str, np.ndarray], context: np.ndarray, request_id: str) -> np.ndarray:
            await release.wait()
            return await super().velocity(path, state, context, request_id)

    async def scenario() -> tuple[Recorder, Recorder]:
        stepper = make_stepper(Waiting(), counts, max_trajectories=1, queue_timeout_s=0.15)
        runs, waits = submit(stepper, request_for(steps=3)), submit(stepper, request_for(steps=3))
        await ended(waits)
        release.set()
        await ended(runs)
        return runs, waits

    runs, waits = asyncio.run(scenario())
    assert runs.error is None and runs.steps == [1, 2, 3]
    assert isinstance(waits.error, Expired) and "begin within 0.15 s" in str(waits.error) and waits.steps == []
    assert "hint: raise queue_timeout_s" in str(waits.error) and counts.outcomes == ["expired", "done"]


def test_the_total_limit_ends_a_request_whose_evaluation_never_does(request_for: Make) -> None:
    class Hanging(Denoiser):
        async def velocity(self, *_: object) -> np.ndarray:
            await asyncio.Event().wait()
            raise AssertionError

    async def scenario() -> Recorder:
        sink = submit(make_stepper(Hanging(), total_timeout_s=0.15), request_for(steps=3))
        await ended(sink)
        return sink

    error = asyncio.run(scenario()).error
    assert isinstance(error, Expired) and "end within 0.15 s" in str(error) and "total_timeout_s" in str(error)


def test_a_cancelled_request_leaves_the_queue(request_for: Make) -> None:
    async def scenario() -> Recorder:
        stepper = make_stepper(Denoiser(), max_trajectories=1)
        runs, waits = submit(stepper, request_for(steps=1000)), submit(stepper, request_for(steps=3))
        waits.gone = True
        await ended(waits)
        assert (stepper.samples, stepper.queued) == (1, 0)
        runs.gone = True
        await ended(runs)
        return waits

    assert asyncio.run(scenario()).steps == []


@pytest.mark.parametrize(
    ("path", "budget", "rows"),
    [
        ("guided", 24, [3, 3]),
        ("guided", 23, [2, 2, 2]),
        ("guided", 1, [1] * 6),
        ("two-batch", 24, [2] * 6),
        ("plain", 999, [6]),
    ],
)
def test_the_token_budget_bounds_a_call(path: str, budget: int, rows: list[int], request_for: Make) -> None:
    denoiser = Denoiser()
    requests = [request_for(steps=2, seed=seed) for seed in range(6)]  # L + T = 8
    asyncio.run(run_together(make_stepper(denoiser, max_tokens_per_step=budget), requests, path))
    assert denoiser.rows == rows


def test_lanes_run_different_groups_at_the_same_time(request_for: Make) -> None:
    for lanes, together in ((1, 1), (2, 2), (3, 2)):
        denoiser = Denoiser()

        async def scenario(denoiser: Denoiser = denoiser, lanes: int = lanes) -> None:
            stepper = make_stepper(denoiser, lanes=lanes)
            await ended(*(submit(stepper, request_for(steps=5, latents=length)) for length in (5, 5, 6, 6)))

        asyncio.run(scenario())
        assert denoiser.most_running == together and denoiser.rows == [2] * 8, "a group is not torn into small calls"


def test_lanes_share_a_group_that_fills_them(request_for: Make) -> None:
    denoiser = Denoiser()
    requests = [request_for(steps=4, seed=seed) for seed in range(8)]
    sinks = asyncio.run(run_together(make_stepper(denoiser, max_batch=4, lanes=2), requests))
    assert denoiser.most_running == 2 and denoiser.rows == [4] * 6
    for request, sink in zip(requests, sinks, strict=True):
        np.testing.assert_allclose(sink.final, expected(request), rtol=1e-6)


def test_a_failure_of_one_part_ends_the_request_once(request_for: Make) -> None:
    denoiser = Denoiser()

    def fail_small(tensors: dict[str, np.ndarray]) -> None:
        if len(tensors["latents"]) == 2:
            raise Ended("out of memory")

    denoiser.bad = fail_small
    (sink,) = asyncio.run(run_together(make_stepper(denoiser, max_batch=4, lanes=2), [request_for(batch=10, steps=3)]))
    assert str(sink.error) == "out of memory" and sink.steps == []


def test_the_context_is_stacked_once_while_a_batch_stays_together(request_for: Make) -> None:
    denoiser = Denoiser()
    asyncio.run(run_together(make_stepper(denoiser), [request_for(steps=9, seed=1), request_for(steps=5, seed=2)]))
    assert denoiser.rows == [2] * 4 + [1] * 4 and denoiser.held == 2


def test_a_stepper_that_holds_no_contexts_stacks_them_at_each_step(request_for: Make) -> None:
    denoiser = Denoiser()
    asyncio.run(run_together(make_stepper(denoiser, contexts_held=0), [request_for(steps=9)]))
    assert denoiser.rows == [1] * 8 and denoiser.held == 8


def test_steps_are_told_after_the_next_call_has_begun(request_for: Make) -> None:
    order: list[str] = []

    class Teller(Recorder):
        def step(self, progress: Progress) -> None:
            order.append(f"told {progress.step}")
            super().step(progress)

    denoiser = Denoiser()
    denoiser.bad = lambda tensors: order.append(f"end at {tensors['t'][0, 0]:.1f}")

    async def scenario() -> None:
        stepper, sink = make_stepper(denoiser), Teller()
        velocity = denoiser.velocity

        async def announced(path: str, state: dict[str, np.ndarray], context: np.ndarray, request_id: str) -> np.ndarray:
            order.append(f"call at {state['t'][0, 0]:.1f}")
            return await velocity(path, state, context, request_id)

        denoiser.velocity = announced
        stepper.submit(Trajectory(request_for(steps=3), "plain"), sink)
        await ended(sink)

    asyncio.run(scenario())
    assert order == ["call at 0.0", "end at 0.0", "call at 0.5", "told 1", "end at 0.5", "told 2", "told 3"]


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([(5, 3), (6, 3), (5, 4)]),  # L, T
        st.sampled_from(["plain", "two-batch"]),
        st.integers(1, 5),  # samples
        st.integers(1, 6),  # steps
        st.integers(0, 12),  # the denoiser call during which the request arrives
    ),
    min_size=1,
    max_size=8,
)


class Watching(Recorder):
    """Logs its name and the number of denoiser calls so far, at each step."""

    def __init__(self, name: int, denoiser: Denoiser, log: list[tuple[int, int]]) -> None:
        super().__init__()
        self.name, self._denoiser, self._log = name, denoiser, log

    def step(self, progress: Progress) -> None:
        self._log.append((self.name, len(self._denoiser.calls)))
        super().step(progress)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arriving=REQUESTS, max_batch=st.integers(2, 6), budget=st.sampled_from([1, 30, 999]), lanes=st.integers(1, 3))
def test_every_call_serves_those_who_have_waited_longest_and_all_results_are_right(
    arriving: list[tuple[tuple[int, int], str, int, int, int]], max_batch: int, budget: int, lanes: int, request_for: Make
) -> None:
    """No group starves: with one lane, a request waits at most for one call of each other sample before its own next call."""
    denoiser, log = Denoiser(), list[tuple[int, int]]()
    requests = [request_for(latents=sizes[0], context=sizes[1], batch=b, steps=s, seed=7) for sizes, _, b, s, _ in arriving]

    async def scenario() -> list[Recorder]:
        stepper = make_stepper(denoiser, max_batch=max_batch, max_tokens_per_step=budget, lanes=lanes)
        sinks = [Watching(index, denoiser, log) for index in range(len(requests))]

        def arrive(index: int) -> None:
            stepper.submit(Trajectory(requests[index], arriving[index][1]), sinks[index])

        for index, (*_, at) in enumerate(arriving):
            previous = denoiser.at.get(at, lambda: None)
            denoiser.at[at] = lambda index=index, previous=previous: (previous(), arrive(index))
        # Requests that were to arrive during a denoiser call that never happens arrive now.
        for at in sorted(denoiser.at):
            while stepper.samples and at in denoiser.at:
                await asyncio.sleep(0)
            denoiser.at.pop(at, lambda: None)()
        await ended(*sinks)
        assert (stepper.samples, stepper.queued) == (0, 0)
        return sinks

    for request, sink in zip(requests, asyncio.run(scenario()), strict=True):
        assert sink.error is None
        np.testing.assert_allclose(sink.final, expected(request), rtol=1e-4, atol=1e-5)
    assert all(rows <= max_batch for rows in denoiser.rows)
    if lanes == 1:
        samples = sum(batch for _, _, batch, _, _ in arriving)
        for name in range(len(requests)):
            calls = [call for who, call in log if who == name]
            assert all(later - earlier <= samples + 1 for earlier, later in zip(calls, calls[1:], strict=False))


@pytest.mark.parametrize(
    ("error", "name", "kind"),
    [
        (ValueError("x"), "INVALID_ARG", "invalid"),
        (NoDenoiser("x"), "NOT_FOUND", "failed"),
        (Overloaded("x"), "UNAVAILABLE", "rejected"),
        (Expired("x"), "CANCELLED", "expired"),
        (Cancelled("x"), "CANCELLED", "cancelled"),
        (Ended("x"), "INTERNAL", "failed"),
        (FloatingPointError("x"), "INTERNAL", "failed"),
    ],
)
def test_each_end_has_a_code_and_an_outcome(error: Exception, name: str, kind: str) -> None:
    assert (code(error), outcome(error)) == (name, kind) and kind in OUTCOMES
