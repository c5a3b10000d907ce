"""The sampler on a real server: requests share denoiser calls, and leave when nobody waits for them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http
from tritonclient.utils import InferenceServerException

from hunyuan3d_client import Client, contract
from hunyuan3d_client.errors import DeadlineExceeded, InvalidInput
from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]
WAIT_S = 60.0
ENDLESS = {"num_latents": 512, "steps": 1000, "preview_every": 0}  # takes many seconds unless it is stopped


class Statistics:
    """The server's counts of one denoiser since this object was made."""

    def __init__(self, raw: triton.InferenceServerClient, model: str = contract.DIT_GUIDED) -> None:
        self._raw, self._model = raw, model
        self._begin = self._read()

    def _read(self) -> tuple[int, int]:
        (found,) = self._raw.get_inference_statistics(self._model).model_stats
        return found.inference_count, found.execution_count

    @property
    def samples(self) -> int:
        """Rows evaluated."""
        return self._read()[0] - self._begin[0]

    @property
    def calls(self) -> int:
        """Executions of the model."""
        return self._read()[1] - self._begin[1]


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits until the condition holds. Fails with `what` if it does not hold within WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_still(statistics: Statistics) -> bool:
    """Whether no evaluation ended within 0.5 s, in which a running trajectory makes several."""
    before = statistics.calls
    time.sleep(0.5)
    return statistics.calls == before


@pytest.fixture
def statistics(raw: triton.InferenceServerClient) -> Iterator[Statistics]:
    """The counts of the guided denoiser, which is idle when the test begins and must be idle when it ends."""
    until(lambda: is_still(Statistics(raw)), "an earlier test's trajectory still runs")
    yield Statistics(raw)
    until(lambda: is_still(Statistics(raw)), "this test's trajectory still runs")


def unary_inputs(tokens: np.ndarray, *, steps: int, num_latents: int, seed: int, module: object = triton) -> list:
    values = {
        "context": ("FP16", tokens),
        "steps": ("INT32", np.array([steps], np.int32)),
        "num_latents": ("INT32", np.array([num_latents], np.int32)),
        "seed": ("INT64", np.array([seed], np.int64)),
    }
    return [
        module.InferInput(name, list(value.shape), dtype).set_data_from_numpy(value) for name, (dtype, value) in values.items()
    ]


def test_streams_share_calls(client: Client, statistics: Statistics, tokens: Make) -> None:
    steps, runs = 40, 4
    barrier = threading.Barrier(runs)

    def run(seed: int) -> None:
        barrier.wait(WAIT_S)
        client.sample(tokens(1, 5), num_latents=64, steps=steps, seed=seed)

    with ThreadPoolExecutor(runs) as pool:
        list(pool.map(run, range(runs)))
    assert statistics.samples == runs * (steps - 1)
    assert statistics.calls < 0.6 * statistics.samples


def test_a_batch_is_one_call_a_step_up_to_the_limit(client: Client, statistics: Statistics, tokens: Make) -> None:
    def counted(samples: int, calls: int) -> None:
        # Triton counts a call after it has passed on the answer, so the last call may be missing for a moment.
        until(lambda: (statistics.samples, statistics.calls) == (samples, calls), f"must be {samples} rows in {calls} calls")

    client.sample(tokens(8, 5), num_latents=7, steps=5)
    counted(8 * 4, 4)
    with pytest.raises(InvalidInput, match="of at most 8 samples"):
        client.sample(tokens(9, 5), num_latents=7, steps=5)
    counted(8 * 4, 4)


def test_unary_requests_and_streams_share_calls(client: Client, raw: triton.InferenceServerClient, statistics: Statistics, tokens: Make) -> None:  # fmt: skip
    steps = 60
    with ThreadPoolExecutor(4) as pool:
        streamed = [pool.submit(client.sample, tokens(1, 5), num_latents=64, steps=steps, seed=seed) for seed in (1, 2)]
        unary = [
            pool.submit(raw.infer, contract.SAMPLER_UNARY, unary_inputs(tokens(1, 5), steps=steps, num_latents=64, seed=seed))
            for seed in (1, 2)
        ]
        for one, other in zip(streamed, unary, strict=True):
            expected, found = one.result(WAIT_S), other.result(WAIT_S).as_numpy("latents")
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert statistics.samples == 4 * (steps - 1)
    assert statistics.calls < 0.7 * statistics.samples


def test_unary_over_http_is_the_stream(client: Client, served: Endpoints, tokens: Make) -> None:
    expected = client.sample(tokens(2, 5), num_latents=9, steps=7, seed=3)
    inputs = unary_inputs(tokens(2, 5), steps=7, num_latents=9, seed=3, module=tritonclient.http)
    with tritonclient.http.InferenceServerClient(served.http) as http:
        answer = http.infer(contract.SAMPLER_UNARY, inputs)
    np.testing.assert_array_equal(answer.as_numpy("latents"), expected)
    assert answer.as_numpy("step").tolist() == answer.as_numpy("total").tolist() == [7]
    assert answer.as_numpy("t").tolist() == [1.0] and answer.as_numpy("path").tolist() == [b"guided"]
    assert answer.as_numpy("batch").tolist() == [2]


def test_a_stream_left_early_stops_within_a_step(client: Client, statistics: Statistics, tokens: Make) -> None:
    steps = client.stream(tokens(1, 64), **ENDLESS)
    for step in steps:
        if step.index == 3:
            break
    steps.close()
    until(lambda: is_still(statistics), "the trajectory must end")
    assert 3 <= statistics.calls < 100


def test_a_cancelled_job_stops_and_its_neighbour_goes_on(
    client: Client, statistics: Statistics, tokens: Make, background: Any
) -> None:
    endless = background(client, tokens(1, 5), num_latents=17, steps=1000, preview_every=0)
    until(lambda: statistics.calls > 3, "the job must begin")
    neighbour = background(client, tokens(1, 5), num_latents=17, steps=80, seed=1, preview_every=0)
    assert endless.cancel()
    found = neighbour.result(timeout_s=WAIT_S)
    expected = client.sample(tokens(1, 5), num_latents=17, steps=80, seed=1)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    until(lambda: is_still(statistics), "the cancelled trajectory must end")
    assert statistics.calls < 900


def test_a_deadline_ends_the_trajectory_on_the_server(client: Client, statistics: Statistics, tokens: Make) -> None:
    with pytest.raises(DeadlineExceeded):
        client.sample(tokens(1, 64), num_latents=512, steps=1000, timeout_s=1.0)
    until(lambda: is_still(statistics), "the trajectory must end")
    assert 1 <= statistics.calls < 999


def test_a_unary_requests_timeout_ends_its_trajectory(raw: triton.InferenceServerClient, statistics: Statistics, tokens: Make) -> None:  # fmt: skip
    inputs = unary_inputs(tokens(1, 64), steps=1000, num_latents=512, seed=0)
    with pytest.raises(InferenceServerException) as caught:
        raw.infer(contract.SAMPLER_UNARY, inputs, timeout=1_000_000, client_timeout=WAIT_S)
    assert caught.value.status() == "StatusCode.CANCELLED" and "deadline has passed" in caught.value.message()
    until(lambda: is_still(statistics), "the trajectory must end")
    assert 1 <= statistics.calls < 999


def test_more_than_the_limit_is_refused_at_once(client: Client, raw: triton.InferenceServerClient, statistics: Statistics, tokens: Make, background: Any) -> None:  # fmt: skip
    jobs = [background(client, tokens(8, 5), num_latents=64, steps=1000, preview_every=0) for _ in range(16)]
    until(lambda: statistics.samples > 64, "eight jobs must have begun")
    until(lambda: overloaded(raw, tokens) is not None, "eight jobs must wait")
    error = overloaded(raw, tokens)
    assert error is not None and error.status() == "StatusCode.UNAVAILABLE"
    assert re.search(r"within 64 and 64 queued, got 64 and 64 and 1 more\nhint: try again in \d+\.\d s", error.message())
    assert all(job.cancel() for job in jobs)
    until(lambda: is_still(statistics), "the cancelled trajectories must end")
    assert client.sample(tokens(1, 5), num_latents=7, steps=3).shape == (1, 7, 64)


def overloaded(raw: triton.InferenceServerClient, tokens: Make) -> InferenceServerException | None:
    try:
        raw.infer(contract.SAMPLER_UNARY, unary_inputs(tokens(1, 5), steps=2, num_latents=64, seed=0), timeout=200_000)
    except InferenceServerException as error:
        return error if error.status() == "StatusCode.UNAVAILABLE" else None
    return None


def test_denoise_requests_share_calls_too(client: Client, raw: triton.InferenceServerClient, tokens: Make, noise: Make) -> None:
    plain = Statistics(raw, contract.DIT)
    runs = 12
    barrier = threading.Barrier(runs)

    def run(seed: int) -> np.ndarray:
        barrier.wait(WAIT_S)
        return client.denoise(noise(1, 128, seed), 0.5, tokens(1, 64))

    with ThreadPoolExecutor(runs) as pool:
        together = list(pool.map(run, range(runs)))
    assert plain.samples == runs and plain.calls < runs
    alone = client.denoise(noise(1, 128, 3), 0.5, tokens(1, 64))
    assert np.linalg.norm(together[3] - alone) <= 1e-5 * np.linalg.norm(alone)
