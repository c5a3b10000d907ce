"""Forecast velocities: their order, the promise of the tolerance, and that nothing else of the sampler changes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import forecast
import numpy as np
import pytest
import schedules
from doubles import Counts, Denoiser, Recorder, expected, make_stepper, run_together
from forecast import Forecast, off_reason
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sample_request import SampleRequest
from trajectory import Trajectory

Make = Callable[..., SampleRequest]
Velocity = Callable[[np.ndarray, float], np.ndarray]
FIFTY = schedules.flow_match(50)


def mixture(seed: int, *, width: float, scale: float = 1.0) -> Velocity:
    """The exact velocity from N(0, 1) to a mixture of four Gaussians of a width in 64 dimensions: (E[end | x] - x) / (1 - t).

    With a scale other than 1 it is guided: v + (scale - 1) (v - u), where u is the velocity to all four and v that to two.
    """
    centres = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float64)

    def towards(own: np.ndarray, x: np.ndarray, t: float) -> np.ndarray:
        spread = (1 - t) ** 2 + (t * width) ** 2
        offsets = x[:, None, :] - t * own[None]
        logits = -np.square(offsets).sum(-1) / (2 * spread)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        ends = own[None] + t * width**2 / spread * offsets
        return ((weights[:, :, None] * ends).sum(1) - x) / (1 - t)

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        conditional = towards(centres[:2], x.astype(np.float64), t)
        unconditional = towards(centres, x.astype(np.float64), t) if scale != 1 else conditional
        return (unconditional + scale * (conditional - unconditional)).astype(np.float32)

    return velocity


def noise(seed: int, tokens: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, 64), np.float32)


def sampled(
    velocity: Velocity, start: np.ndarray, sigmas: np.ndarray, tolerance: float
) -> tuple[np.ndarray, Forecast, list[int]]:
    """The end of one sample that is stepped with forecasts, its Forecast, and the steps that were evaluated."""
    one, state, evaluated = Forecast(sigmas, tolerance), start, []
    for step in range(np.count_nonzero(np.diff(sigmas))):
        if step == one.next:
            evaluated.append(step)
            one.receive(state, velocity(state, sigmas[step]))
        state = one.state(step + 1)
    return state, one, evaluated


def euler(velocity: Velocity, start: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    state = start
    for now, later in zip(sigmas[:-1], sigmas[1:], strict=True):
        if later != now:
            state = state + np.float32(later - now) * velocity(state, now)
    return state


def deviation(found: np.ndarray, full: np.ndarray) -> float:
    return float(np.linalg.norm(found - full) / np.linalg.norm(full))


@pytest.mark.parametrize("scale", [1.0, 1.3, 4.0])
@pytest.mark.parametrize("width", [0.05, 0.3, 1.0])
def test_the_promise_of_the_tolerance(width: float, scale: float) -> None:
    """On a flow whose velocity is known exactly, the result differs by at most the tolerance from that of all 49 evaluations."""
    for seed in range(4):
        velocity, start = mixture(seed, width=width, scale=scale), noise(seed)
        full, counts = euler(velocity, start, FIFTY), []
        for tolerance in (0.01, 0.03, 0.1):
            found, one, evaluated = sampled(velocity, start, FIFTY, tolerance)
            assert deviation(found, full) <= tolerance and one.error <= 1.5 * tolerance
            assert one.evaluations == len(evaluated) and {*range(forecast.EARLY), 48} <= set(evaluated)
            counts.append(one.evaluations)
        assert counts == sorted(counts, reverse=True) and counts[-1] <= 25


def test_a_gap_is_corrected_once_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the correction the same evaluations leave more than twice the deviation."""
    velocity, start = mixture(1, width=0.3, scale=1.3), noise(1)
    full = euler(velocity, start, FIFTY)
    corrected = deviation(sampled(velocity, start, FIFTY, 0.005)[0], full)
    monkeypatch.setattr(Forecast, "_missing", lambda *_: 0.0)
    assert deviation(sampled(velocity, start, FIFTY, 0.005)[0], full) > 2 * corrected


@pytest.mark.parametrize("order", forecast.ORDERS)
def test_end_points_on_a_polynomial_are_forecast_exactly(order: int) -> None:
    """The velocity that leads to an end point of the form a + b t + ... is forecast without error; one order more is not."""
    coefficients = np.random.default_rng(3).standard_normal((max(forecast.ORDERS) + 2, 5, 64))

    def towards(degree: int) -> Velocity:
        return lambda x, t: ((sum(t**k * coefficients[k] for k in range(degree + 1)) - x) / (1 - t)).astype(np.float32)

    exact, one, evaluated = sampled(towards(order), noise(0, 5), FIFTY, 1e-4)
    assert deviation(exact, euler(towards(order), noise(0, 5), FIFTY)) < 1e-4 and one.error < 1e-4 and len(evaluated) <= 16
    assert len(sampled(towards(max(forecast.ORDERS) + 1), noise(0, 5), FIFTY, 1e-4)[2]) > 20


def test_a_jump_ends_the_gaps() -> None:
    """After an unforeseen change the next steps are evaluated, although a constant end point is forecast exactly again."""

    def jumping(x: np.ndarray, t: float) -> np.ndarray:
        return (np.where(t < 0.5, 1.0, -1.0) - x).astype(np.float32) / np.float32(1 - t)

    _, _, evaluated = sampled(jumping, noise(0), FIFTY, 0.03)
    before = np.diff([step for step in evaluated if step < 25])
    first = next(index for index, step in enumerate(evaluated) if step >= 25)
    assert before.max() == forecast.MOST_SKIPPED + 1 and np.diff(evaluated)[first : first + 2].tolist() == [1, 1]


@pytest.mark.parametrize("token", [0, 7])
def test_a_single_token_counts(token: int) -> None:
    """One token in 24 that goes another way makes the gaps shorter, although the norm of all tokens hardly feels it."""

    def bent(x: np.ndarray, t: float) -> np.ndarray:
        end = np.ones_like(x)
        end[token] += np.float32(0.5 * np.sin(12 * t))
        return (end - x) / np.float32(1 - t)

    straight, bending = (
        sampled(v, noise(0), FIFTY, 0.05)[1].evaluations for v in (lambda x, t: (1 - x) / np.float32(1 - t), bent)
    )
    assert bending >= straight + 4


@hypothesis_settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 80), tolerance=st.floats(1e-6, 0.99), seed=st.integers(0, 99))
def test_the_first_steps_and_the_last_are_always_evaluated(steps: int, tolerance: float, seed: int) -> None:
    sigmas = schedules.flow_match(steps)
    found, one, evaluated = sampled(mixture(seed, width=0.3), noise(seed, 2), sigmas, tolerance)
    sizes = np.count_nonzero(np.diff(sigmas))
    assert {*range(min(forecast.EARLY, sizes)), sizes - 1} <= set(evaluated) and np.isfinite(found).all()
    assert max(np.diff(evaluated), default=1) <= forecast.MOST_SKIPPED + 1 and np.isfinite(one.error)


def test_where_forecasts_are_off() -> None:
    assert off_reason("flow_match", FIFTY) is None
    assert off_reason("flow_match", schedules.flow_match(forecast.EARLY + 2)) == (
        "the first 4 steps and the last one are always evaluated, so 6 steps are too few"
    )
    assert off_reason("flow_match", schedules.flow_match(forecast.EARLY + 3)) is None
    for steps in (1, 5, 50):
        reason = "the steps of the schedule consistency are too far apart to be forecast"
        assert off_reason("consistency", schedules.consistency(steps)) == reason


def evaluated_steps(trajectory: Trajectory) -> list[int]:
    return [forecast.evaluations for forecast in trajectory._forecasts]


@pytest.mark.parametrize("steps", [2, 7, 50])
@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_tolerance_every_bit_is_eulers(batch: int, steps: int, request_for: Make) -> None:
    denoiser, counts = Denoiser(), Counts()
    request = request_for(batch=batch, steps=steps)
    (sink,) = asyncio.run(run_together(make_stepper(denoiser, counts), [request]))
    np.testing.assert_array_equal(sink.final, expected(request))
    assert sink.evaluated == [*[batch] * (steps - 1), 0] and sink.last.evaluations == (steps - 1,) * batch
    assert sink.last.forecast_errors == (0.0,) * batch and counts.forecast == 0 and counts.errors == []


def test_a_step_that_is_forecast_costs_no_call_and_is_told(request_for: Make) -> None:
    denoiser, counts = Denoiser(), Counts()
    request = request_for(batch=2, steps=50, tolerance=np.float32([0.05]), preview_every=1)
    (sink,) = asyncio.run(run_together(make_stepper(denoiser, counts), [request]))
    assert sink.steps == [*range(1, 51)], "progress is told at every step"
    assert sum(sink.evaluated) == sum(denoiser.rows) == sum(sink.last.evaluations) and 0 in sink.evaluated[:-1]
    assert len(denoiser.calls) < 30 and counts.steps == 98 and counts.forecast == 98 - sum(denoiser.rows)
    assert counts.errors == list(sink.last.forecast_errors) and 0 < max(counts.errors) <= 0.05
    assert deviation(sink.final, expected(request)) < 0.05


def test_previews_hold_the_state_of_their_own_step(request_for: Make) -> None:
    seen: dict[int, np.ndarray] = {}

    class Watching(Recorder):
        def step(self, progress: object) -> None:
            super().step(progress)
            if progress.latents is not None:
                seen[progress.step] = progress.latents.copy()

    async def scenario() -> None:
        sink, stepper = Watching(), make_stepper(Denoiser())
        request = request_for(steps=50, tolerance=np.float32([0.2]), preview_every=2)
        stepper.submit(Trajectory(request, "plain"), sink)
        await sink.ended.wait()

    asyncio.run(scenario())
    assert list(seen) == [*range(2, 49, 2), 50]
    assert all((one != other).any() for one, other in zip(list(seen.values())[:-1], list(seen.values())[1:], strict=True))


def test_previews_change_no_bit_of_the_result(request_for: Make) -> None:
    """The states of a gap are computed only where a preview or a call needs them, and each of them on its own."""
    requests = [request_for(batch=2, steps=50, tolerance=np.float32([0.1]), preview_every=every) for every in (0, 1, 3)]
    finals = [asyncio.run(run_together(make_stepper(Curved()), [request], "plain"))[0].final for request in requests]
    np.testing.assert_array_equal(finals[0], finals[1])
    np.testing.assert_array_equal(finals[0], finals[2])


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_a_state_in_a_gap_is_that_of_its_euler_steps(tolerance: float) -> None:
    """Here the steps are made one after the other: each moves towards the polynomial through the last known end points."""
    velocity, state, one = mixture(2, width=0.3), noise(2), Forecast(FIFTY, tolerance)
    gaps = 0
    while one.next < 49:
        step = one.next
        one.receive(state, velocity(state, FIFTY[step]))
        stepped, known = one._state.astype(np.float64), one._known[-one._order - 1 :]
        times = np.array([time for time, _ in known])
        ends = np.stack([end for _, end in known]).astype(np.float64)
        for at in range(step, one.next):
            shares = [np.prod((FIFTY[at] - np.delete(times, i)) / (times[i] - np.delete(times, i))) for i in range(len(times))]
            end = np.tensordot(shares, ends, 1)
            stepped = stepped + (FIFTY[at + 1] - FIFTY[at]) * (end - stepped) / (1 - FIFTY[at])
            assert deviation(one.state(at + 1), stepped) < 1e-5
        gaps += one.next - step > 1
        state = one.state(one.next)
    assert gaps > 5


SHARED = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([0.0, 0.01, 0.1]), st.integers(4, 20), st.integers(0, 5)),
    min_size=1,
    max_size=5,
)


class Curved(Denoiser):
    """Answers a velocity that bends more, the larger the sample's first number is: so samples of a batch have different gaps."""

    async def velocity(self, path: str, state: dict[str, np.ndarray], context: np.ndarray, request_id: str) -> np.ndarray:
        await super().velocity(path, state, context, request_id)
        t, latents = state["t"][:, :, None], state["latents"]
        return np.sin(t * (6 + 4 * np.tanh(latents[:, :1, :1]))) - latents


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(others=SHARED, max_batch=st.integers(2, 6), lanes=st.integers(1, 2))
def test_a_samples_gaps_do_not_depend_on_who_shares_its_calls(
    others: list[tuple[int, float, int, int]], max_batch: int, lanes: int, request_for: Make
) -> None:
    requests = [
        request_for(batch=batch, steps=steps, seed=seed, tolerance=np.float32([tolerance]))
        for batch, tolerance, steps, seed in [(2, 0.05, 20, 0), *others]
    ]
    together = asyncio.run(run_together(make_stepper(Curved(), max_batch=max_batch, lanes=lanes), requests, "plain"))
    for request, sink in zip(requests, together, strict=True):
        rows = [
            dataclasses.replace(request, context=request.context[i : i + 1], latents=request.latents[i : i + 1])
            for i in range(len(request.latents))
        ]
        alone = [asyncio.run(run_together(make_stepper(Curved()), [row], "plain"))[0] for row in rows]
        np.testing.assert_array_equal(sink.final, np.concatenate([one.final for one in alone]))
        assert sink.last.evaluations == tuple(count for one in alone for count in one.last.evaluations)
        assert sink.last.forecast_errors == tuple(error for one in alone for error in one.last.forecast_errors)


def test_samples_of_a_request_have_their_own_gaps(request_for: Make) -> None:
    denoiser = Curved()
    request = request_for(batch=6, steps=50, tolerance=np.float32([0.02]))
    (sink,) = asyncio.run(run_together(make_stepper(denoiser), [request], "two-batch"))
    assert len(set(sink.last.evaluations)) > 1 and sum(denoiser.rows) == 2 * sum(sink.last.evaluations)
    assert any(0 < evaluated < 6 for evaluated in sink.evaluated)


def test_nan_of_an_evaluation_ends_the_sample_at_its_step(request_for: Make) -> None:
    denoiser = Denoiser()
    denoiser.bad = lambda tensors: tensors["latents"] * np.float32(np.nan) if len(denoiser.calls) == 6 else None
    (sink,) = asyncio.run(run_together(make_stepper(denoiser), [request_for(steps=50, tolerance=np.float32([0.1]))]))
    assert isinstance(sink.error, FloatingPointError) and f"at step {sink.steps[-1] + 1} of 50" in str(sink.error)
    assert len(denoiser.calls) == 6 and sink.steps[-1] > 5, "steps had been forecast before"


def test_a_forecast_that_is_not_finite_ends_the_sample(request_for: Make) -> None:
    trajectory = Trajectory(request_for(steps=50, tolerance=np.float32([0.5])), "plain")
    part = trajectory.take(1)
    while trajectory.step < forecast.EARLY - 1:
        trajectory.receive(part, np.ones_like(trajectory.latents))
        part = trajectory.take(1)
    trajectory._forecasts[0].state = lambda _step: trajectory.latents * np.float32(np.inf)
    with pytest.raises(FloatingPointError, match="got NaN or Inf at step 10 of 50"), np.errstate(invalid="ignore"):
        trajectory.receive(part, np.ones_like(trajectory.latents))


def test_a_client_that_leaves_is_told_nothing_more(request_for: Make) -> None:
    """Cancelled during a call, and by an error while the steps of one gap are told."""
    denoiser = Denoiser()

    class Leaving(Recorder):
        def step(self, progress: object) -> None:
            super().step(progress)
            if progress.step == 7:
                raise ConnectionError("gone")

    async def scenario() -> tuple[Recorder, Recorder]:
        stepper, gone, leaving = make_stepper(denoiser), Recorder(), Leaving()
        denoiser.at[5] = lambda: setattr(gone, "gone", True)
        for sink in (gone, leaving):
            stepper.submit(Trajectory(request_for(steps=50, tolerance=np.float32([0.2])), "plain"), sink)
        await asyncio.gather(gone.ended.wait(), leaving.ended.wait())
        await asyncio.sleep(0.05)
        assert stepper.samples == stepper.queued == 0
        return gone, leaving

    gone, leaving = asyncio.run(scenario())
    assert str(gone.error) == "gone" and isinstance(leaving.error, ConnectionError) and leaving.steps[-1] == 7
    assert len(denoiser.calls) <= 8
