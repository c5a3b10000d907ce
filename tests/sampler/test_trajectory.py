"""The served sampler's arithmetic against the reference loop, with torch as the denoiser of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import Ended
from sample_request import SampleRequest
from settings import Settings
from trajectory import Progress, Trajectory, combine, context_rows, state_rows

from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.dit import Hunyuan3DDiT
from hunyuan3d_export.dit.reference_sampler import sample, sigmas

Make = Callable[..., SampleRequest]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch gets one thread, because a network this small loses more time to waiting threads than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(micro: Any) -> Hunyuan3DDiT:
    return micro.load(torch.float32)


@pytest.fixture(scope="module")
def distilled_model(micro_distilled: Any) -> Hunyuan3DDiT:
    return micro_distilled.load(torch.float32)


def evaluate(model: Hunyuan3DDiT, path: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """One denoiser call in torch, from the tensors as they go to Triton."""
    arrays = {name: torch.from_numpy(value if value.ndim > 1 and value.shape[1] > 1 else value[:, 0]) for name, value in tensors.items()}  # fmt: skip
    return (model.guided(**arrays) if path == "guided" else model(**arrays)).numpy()


def run(model: Hunyuan3DDiT, requests: list[SampleRequest], path: str) -> list[np.ndarray]:
    trajectories = [Trajectory(request, path) for request in requests]
    while active := [trajectory for trajectory in trajectories if not trajectory.done]:
        parts = [trajectory.take(trajectory.samples) for trajectory in active]
        velocity = combine(parts, evaluate(model, path, {**state_rows(parts), "context": context_rows(parts)}))
        rows = np.split(velocity, np.cumsum([part.samples for part in parts])[:-1])
        for part, values in zip(parts, rows, strict=True):
            assert part.trajectory.receive(part, values)
    return [trajectory.latents for trajectory in trajectories]


def reference(model: Hunyuan3DDiT, request: SampleRequest, path: str) -> torch.Tensor:
    negative = request.negative_context
    return sample(
        model,
        torch.from_numpy(request.context),
        torch.from_numpy(request.latents),
        list(request.sigmas),
        guidance_scale=request.guidance_scale,
        path=path,
        negative_context=None if negative is None else torch.from_numpy(negative),
    )


@pytest.mark.parametrize("path", ["plain", "guided", "two-batch"])
def test_base_model_batched_with_others(path: str, model: Hunyuan3DDiT, request_for: Make) -> None:
    requests = [
        request_for(batch=2, steps=12, seed=1),
        request_for(steps=5, seed=7, guidance_scale=1.5),
        request_for(batch=3, steps=4, seed=11, guidance_scale=0.0, schedule=b"consistency"),
    ]
    expected_path = "plain" if path == "plain" else "two-batch"
    for request, found in zip(requests, run(model, requests, path), strict=True):
        assert relative_l2(torch.from_numpy(found), reference(model, request, expected_path)) <= 1e-5


def test_own_negative_context(model: Hunyuan3DDiT, request_for: Make, tokens: Callable[..., np.ndarray]) -> None:
    zeros = request_for(batch=2, steps=5)
    own = dataclasses.replace(zeros, negative_context=tokens(2, 3, seed=5))
    without, found = run(model, [zeros, own], "two-batch")
    assert relative_l2(torch.from_numpy(found), reference(model, own, "two-batch")) <= 1e-5
    assert relative_l2(torch.from_numpy(found), torch.from_numpy(without)) > 1e-2


def test_distilled(distilled_model: Hunyuan3DDiT, request_for: Make) -> None:
    requests = [request_for(batch=2, steps=5, schedule=b"consistency"), request_for(steps=8, guidance_scale=2.0, seed=4)]
    for request, found in zip(requests, run(distilled_model, requests, "distilled"), strict=True):
        assert relative_l2(torch.from_numpy(found), reference(distilled_model, request, "distilled")) <= 1e-5


def advance(trajectory: Trajectory, velocity: np.ndarray) -> list[Progress]:
    """One step, all samples at once, and the steps of size 0 behind it."""
    steps = trajectory.receive(trajectory.take(trajectory.samples), velocity)
    assert [(step.evaluated, step.forecast) for step in steps] == [(trajectory.samples, 0), *([(0, 0)] * (len(steps) - 1))]
    return steps


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 1), (2, 1), (5, 4), (50, 49)])
def test_a_step_of_size_zero_is_not_evaluated(steps: int, evaluations: int, request_for: Make) -> None:
    trajectory = Trajectory(request_for(steps=steps), "guided")
    seen = []
    while not trajectory.done:
        seen.append(trajectory.t)
        advance(trajectory, np.ones_like(trajectory.latents))
    assert len(seen) == evaluations and trajectory.step == trajectory.total == steps and trajectory.t == 1
    np.testing.assert_allclose(seen, sigmas("flow_match", steps)[:evaluations])
    np.testing.assert_allclose(trajectory.latents, trajectory.request.latents + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("every", "previews"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_previews(every: int, previews: list[int], request_for: Make) -> None:
    trajectory = Trajectory(request_for(steps=5, preview_every=every), "guided")
    due = []
    while not trajectory.done:
        due += [
            progress.step for progress in advance(trajectory, np.zeros_like(trajectory.latents)) if progress.latents is not None
        ]
    assert due == previews


def test_state_is_float32_and_the_requests_noise_stays(request_for: Make) -> None:
    trajectory = Trajectory(request_for(steps=3), "plain")
    noise = trajectory.request.latents.copy()
    advance(trajectory, np.ones(trajectory.latents.shape, np.float32))
    assert trajectory.latents.dtype == np.float32
    np.testing.assert_array_equal(trajectory.request.latents, noise)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_state_that_is_not_finite_ends_the_trajectory(value: float, request_for: Make) -> None:
    trajectory = Trajectory(request_for(steps=1, latents=2), "plain")
    trajectory.latents = np.full_like(trajectory.latents, 3e38)
    with (
        pytest.raises(FloatingPointError, match="latents must stay finite, got NaN or Inf at step 1 of 1"),
        np.errstate(over="ignore"),
    ):
        advance(trajectory, np.full(trajectory.latents.shape, value, np.float32))


def test_a_step_is_done_when_all_its_parts_have_come(request_for: Make) -> None:
    trajectory = Trajectory(request_for(batch=5, steps=3), "plain")
    velocity = np.random.default_rng(0).standard_normal(trajectory.latents.shape, np.float32)
    before = trajectory.latents
    parts = [trajectory.take(2), trajectory.take(2), trajectory.take(2)]
    assert [part.samples for part in parts] == [2, 2, 1] and trajectory.waiting == 0
    done = [len(trajectory.receive(parts[i], velocity[parts[i].slice])) for i in (2, 0, 1)]
    assert done == [0, 0, 1] and trajectory.waiting == 5 and trajectory.step == 1
    np.testing.assert_array_equal(trajectory.latents, before + np.float32(0.5) * velocity)


@pytest.mark.parametrize("path", ["plain", "two-batch"])
def test_an_answer_of_another_shape_is_refused(path: str, request_for: Make) -> None:
    part = Trajectory(request_for(batch=2), path).take(2)
    rows = 2 * part.trajectory.rows_per_sample
    with pytest.raises(Ended, match=rf"velocity must be \[{rows}, 5, 64\], got \[{rows}, 4, 64\]"):
        combine([part], np.zeros((rows, 4, 64), np.float32))


def test_groups(request_for: Make) -> None:
    def group(path: str = "guided", **options: object) -> tuple[int, int, str]:
        return Trajectory(request_for(**options), path).group

    assert group() == group(steps=3, guidance_scale=2.0, batch=2, schedule=b"consistency", seed=4)
    assert len({group(), group(latents=6), group(context=4), group("plain")}) == 4


def test_settings_fixture_is_what_is_deployed(base: Settings) -> None:
    assert (base.steps, base.guidance_scale, base.schedule) == (50, 5.0, "flow_match")
