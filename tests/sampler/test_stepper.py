"""Continuous batching: which requests share a call, which wait, and which of them a failure ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import stepper as stepper_module
from doubles import Denoiser, Recorder, expected, make_stepper, run_together
from outcomes import Ended
from sample_request import SampleRequest
from trajectory import Trajectory

Make = Callable[..., SampleRequest]


def test_one_trajectory(request_for: Make) -> None:
    denoiser = Denoiser()
    request = request_for(batch=2, steps=4)
    (sink,) = asyncio.run(run_together(make_stepper(denoiser, max_batch=8), [request]))
    assert denoiser.calls == [("guided", 2, 5)] * 3, "the last of four steps has size 0"
    assert sink.steps == [1, 2, 3, 4]
    np.testing.assert_allclose(sink.final, expected(request), rtol=1e-6)


def test_equal_shapes_share_calls_whatever_their_time_scale_and_schedule(request_for: Make) -> None:
    denoiser = Denoiser()
    requests = [
        request_for(steps=4, seed=1),
        request_for(steps=7, guidance_scale=2.0, seed=2),
        request_for(batch=2, steps=3, schedule=b"consistency", seed=3),
    ]
    sinks = asyncio.run(run_together(make_stepper(denoiser, max_batch=8), requests))
    assert denoiser.rows == [4, 4, 4, 1, 1, 1]
    assert [sink.batches for sink in sinks] == [[4, 4, 4, 4], [4, 4, 4, 1, 1, 1, 1], [4, 4, 4]], (
        "each hears who shared its step"
    )
    for request, sink in zip(requests, sinks, strict=True):
        np.testing.assert_allclose(sink.final, expected(request), rtol=1e-6)


def test_a_late_request_joins_at_the_next_step(request_for: Make) -> None:
    denoiser, late = Denoiser(), Recorder()

    async def scenario() -> None:
        stepper = make_stepper(denoiser, max_batch=8)
        request = request_for(steps=4, seed=9)
        denoiser.at[2] = lambda: stepper.submit(Trajectory(request, "guided"), late)
        await run_together(stepper, [request_for(steps=6)])
        await late.ended.wait()
        np.testing.assert_allclose(late.final, expected(request), rtol=1e-6)

    asyncio.run(scenario())
    assert denoiser.rows == [1, 1, 2, 2, 2]


def test_a_call_names_the_requests_that_share_it(request_for: Make) -> None:
    denoiser = Denoiser()

    async def scenario() -> None:
        stepper, sinks = make_stepper(denoiser, max_batch=8), [Recorder() for _ in range(2)]
        stepper.submit(Trajectory(request_for(steps=4), "guided", "first"), sinks[0])
        stepper.submit(Trajectory(request_for(steps=3, seed=1), "guided", "second"), sinks[1])
        await asyncio.gather(*(sink.ended.wait() for sink in sinks))

    asyncio.run(scenario())
    assert [sorted(ids.split(",")) for ids in denoiser.request_ids] == [["first", "second"]] * 2 + [["first"]]


def test_different_groups_take_turns(request_for: Make) -> None:
    denoiser = Denoiser()

    async def scenario() -> None:
        stepper, sinks = make_stepper(denoiser, max_batch=8), [Recorder() for _ in range(3)]
        stepper.submit(Trajectory(request_for(steps=4), "guided"), sinks[0])
        stepper.submit(Trajectory(request_for(steps=4, latents=6), "guided"), sinks[1])
        stepper.submit(Trajectory(request_for(steps=4), "plain"), sinks[2])
        await asyncio.gather(*(sink.ended.wait() for sink in sinks))

    asyncio.run(scenario())
    assert denoiser.calls == [("guided", 1, 5), ("guided", 1, 6), ("plain", 1, 5)] * 3


def test_more_than_fit_alternate_fairly(request_for: Make) -> None:
    denoiser = Denoiser()
    requests = [request_for(batch=3, steps=6, seed=10 * i) for i in range(4)]
    sinks = asyncio.run(run_together(make_stepper(denoiser, max_batch=8), requests))
    assert denoiser.rows == [8] * 7 + [4], "a request's samples may go into two calls, so calls are full"
    for request, sink in zip(requests, sinks, strict=True):
        np.testing.assert_allclose(sink.final, expected(request), rtol=1e-6)


@pytest.mark.parametrize(("path", "batch", "rows"), [("guided", 11, [4, 4, 3]), ("two-batch", 3, [4, 2]), ("plain", 4, [4])])
def test_a_request_larger_than_a_call_is_split(path: str, batch: int, rows: list[int], request_for: Make) -> None:
    denoiser = Denoiser()
    request = request_for(batch=batch, steps=3)
    (sink,) = asyncio.run(run_together(make_stepper(denoiser, max_batch=4), [request], path))
    assert denoiser.rows == rows * 2
    np.testing.assert_allclose(sink.final, expected(request), rtol=1e-5, atol=1e-6)


def test_two_batch_counts_both_branches(request_for: Make) -> None:
    denoiser = Denoiser()
    asyncio.run(
        run_together(make_stepper(denoiser, max_batch=4), [request_for(steps=2, seed=i) for i in range(3)], "two-batch")
    )
    assert denoiser.rows == [4, 2]


def test_a_failing_denoiser_ends_its_group_alone(request_for: Make) -> None:
    denoiser = Denoiser()

    def fail_long(tensors: dict[str, np.ndarray]) -> None:
        if tensors["latents"].shape[1] == 6:
            raise RuntimeError("out of memory")

    denoiser.bad = fail_long
    requests = [request_for(steps=4, latents=length) for length in (5, 6, 6)]
    fine, *failed = asyncio.run(run_together(make_stepper(denoiser, max_batch=8), requests))
    assert fine.error is None and fine.steps == [1, 2, 3, 4]
    assert [str(sink.error) for sink in failed] == ["out of memory"] * 2 and all(sink.steps == [] for sink in failed)


def test_a_wrong_answer_of_the_denoiser_ends_its_group(request_for: Make) -> None:
    denoiser = Denoiser()
    denoiser.bad = lambda tensors: tensors["latents"][:, :-1]
    (sink,) = asyncio.run(run_together(make_stepper(denoiser, max_batch=8), [request_for(steps=4)]))
    assert isinstance(sink.error, Ended) and "velocity must be [1, 5, 64], got [1, 4, 64]" in str(sink.error)


def test_nan_ends_one_trajectory_only(request_for: Make) -> None:
    denoiser = Denoiser()
    requests = [request_for(steps=4, seed=i) for i in range(3)]

    def poison(tensors: dict[str, np.ndarray]) -> np.ndarray | None:
        if len(denoiser.calls) != 2:
            return None
        velocity = tensors["t"][:, :, None] - tensors["latents"]
        velocity[1, 2, 3] = np.nan
        return velocity

    denoiser.bad = poison
    first, second, third = asyncio.run(run_together(make_stepper(denoiser, max_batch=8), requests))
    assert isinstance(second.error, FloatingPointError) and second.steps == [1]
    assert "NaN or Inf at step 2 of 4" in str(second.error)
    for request, sink in ((requests[0], first), (requests[2], third)):
        assert sink.error is None
        np.testing.assert_allclose(sink.final, expected(request), rtol=1e-6)
    assert denoiser.rows == [3, 3, 2]


def test_a_cancelled_request_leaves_within_a_step(request_for: Make) -> None:
    denoiser = Denoiser()

    async def scenario() -> tuple[Recorder, Recorder]:
        stepper, stays, leaves = make_stepper(denoiser, max_batch=8), Recorder(), Recorder()
        denoiser.at[3] = lambda: setattr(leaves, "gone", True)
        stepper.submit(Trajectory(request_for(steps=9, seed=1), "guided"), stays)
        stepper.submit(Trajectory(request_for(steps=9, seed=2), "guided"), leaves)
        assert stepper.samples == 2
        await asyncio.gather(stays.ended.wait(), leaves.ended.wait())
        assert stepper.samples == 0
        return stays, leaves

    stays, leaves = asyncio.run(scenario())
    assert denoiser.rows == [2, 2, 2, 1, 1, 1, 1, 1]
    assert str(leaves.error) == "gone" and leaves.steps == [1, 2], "its client had gone before the third step was told"
    assert stays.steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_sink_that_fails_ends_its_own_trajectory(request_for: Make) -> None:
    class Broken(Recorder):
        def step(self, _trajectory: Trajectory) -> None:
            raise ConnectionError("nobody there")

        def fail(self, error: Exception) -> None:
            super().fail(error)
            raise ConnectionError("nobody there either")

    async def scenario() -> tuple[Recorder, Recorder]:
        stepper, broken, fine = make_stepper(Denoiser(), max_batch=8), Broken(), Recorder()
        stepper.submit(Trajectory(request_for(steps=4), "guided"), broken)
        stepper.submit(Trajectory(request_for(steps=4, seed=3), "guided"), fine)
        await asyncio.wait_for(fine.ended.wait(), 20)
        return broken, fine

    broken, fine = asyncio.run(scenario())
    assert str(broken.error) == "nobody there" and fine.steps == [1, 2, 3, 4]


def test_the_stepper_works_again_after_it_was_idle(request_for: Make) -> None:
    denoiser = Denoiser()

    async def scenario() -> None:
        stepper = make_stepper(denoiser, max_batch=8)
        for seed in range(3):
            (sink,) = await run_together(stepper, [request_for(steps=2, seed=seed)])
            assert sink.final is not None and stepper.samples == 0
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))  # wait until the stepper is idle

    asyncio.run(scenario())
    assert denoiser.rows == [1, 1, 1]


def test_requests_that_arrive_together_share_the_first_call(request_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call starts a tenth of a call after the last arrival, and at most three tenths after the first arrival."""
    monkeypatch.setattr(stepper_module, "_LONGEST_CALL_S", 20.0)  # far from the time that this test takes

    async def scenario() -> tuple[Denoiser, list[float]]:
        denoiser, waits = Denoiser(), []
        stepper, sinks = make_stepper(denoiser), [Recorder() for _ in range(3)]
        stepper._call_s = 20.0
        begin = asyncio.get_running_loop().time()
        for sink in sinks:
            stepper.submit(Trajectory(request_for(steps=5), "plain"), sink)
            waits.append(stepper._gathering.when() - asyncio.get_running_loop().time())
            await asyncio.sleep(0.01)
        stepper._first_arrival = begin - 5.0
        stepper._gather()
        waits.append(stepper._gathering.when() - begin)
        assert denoiser.calls == []
        stepper._pump()
        assert stepper._gathering is None
        await asyncio.gather(*(sink.ended.wait() for sink in sinks))
        return denoiser, waits

    denoiser, waits = asyncio.run(scenario())
    assert denoiser.rows[0] == 3 and waits == pytest.approx([2.0, 2.0, 2.0, 1.0], abs=0.1)


@pytest.mark.parametrize(("call_s", "waits_s"), [(0.0, 0.0), (0.5, 0.05), (60.0, 0.1)])
def test_a_request_waits_a_tenth_of_a_call_and_never_long(call_s: float, waits_s: float, request_for: Make) -> None:
    """A request does not wait at all before the server has made its first call."""

    async def scenario() -> float:
        stepper = make_stepper(Denoiser())
        stepper._call_s = call_s
        stepper.submit(Trajectory(request_for(steps=2), "plain"), Recorder())
        return stepper._gathering.when() - stepper._first_arrival

    assert asyncio.run(scenario()) == pytest.approx(waits_s, abs=1e-9)
