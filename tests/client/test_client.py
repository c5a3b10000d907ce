"""AsyncClient and Client over a MockTransport: deadlines, slots, retries, jobs, cancellation, and every option's effect."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract
from hunyuan3d_client.transport import Tensors

Tokens = Callable[..., np.ndarray]
LATENTS = np.ones((1, 3, 64), np.float32)


def double(request: h.Request) -> list[Tensors]:
    return [{"velocity": request.inputs["latents"] * 2}]


class Stalled(h.MockTransport):
    """Takes requests and answers none until `go`."""

    def __init__(self) -> None:
        super().__init__(double)
        self.started = threading.Semaphore(0)
        self.go = asyncio.Event()

    async def infer(self, request: h.Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        self.started.release()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        async for answer in super().infer(request, timeout_s=timeout_s):
            yield answer


class Failing(h.MockTransport):
    """Fails with each status in turn, then answers."""

    def __init__(self, *statuses: grpc.StatusCode | None) -> None:
        super().__init__(self._fail)
        self._statuses = list(statuses)

    def _fail(self, request: h.Request) -> Iterable[Tensors]:
        if self._statuses:
            raise h.StatusError(self._statuses.pop(0), "words that must not matter: UNAVAILABLE INVALID_ARGUMENT")
        return double(request)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hunyuan3d_client.exchange._FIRST_PAUSE_S", 1e-3)


def make(transport: h.MockTransport, **options: Any) -> h.Client:
    return h.Client(transport=transport, **options)


@pytest.mark.parametrize(("batch", "parts"), [(1, [1]), (8, [8]), (9, [8, 1]), (19, [8, 8, 3])])
def test_denoise_splits_and_joins_batches(batch: int, parts: list[int], tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    latents = np.arange(batch * 64, dtype=np.float32).reshape(batch, 1, 64)
    with make(transport) as client:
        velocity = client.denoise(latents, 0.5, tokens(batch))
    np.testing.assert_array_equal(velocity, latents * 2)
    assert [len(request.inputs["latents"]) for request in transport.requests] == parts


def test_the_servers_own_batch_limit_is_kept(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    transport.models[contract.DIT] = dataclasses.replace(transport.models[contract.DIT], max_batch_size=2)
    with make(transport) as client:
        client.denoise(np.ones((3, 1, 64)), 0.5, tokens(3))
    assert [len(request.inputs["latents"]) for request in transport.requests] == [2, 1]


def test_one_failed_part_fails_the_call(tokens: Tokens) -> None:
    transport = Failing(grpc.StatusCode.INTERNAL)
    with make(transport) as client, pytest.raises(h.ModelFailed):
        client.denoise(np.ones((9, 1, 64)), 0.5, tokens(9))


def test_guidance_scale_asks_the_guided_model(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with make(transport) as client:
        client.denoise(LATENTS, 0.5, tokens(), guidance_scale=4)
    assert transport.requests[0].model == contract.DIT_GUIDED and transport.requests[0].inputs["guidance_scale"] == [4]


def test_guided_model_that_is_missing(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    del transport.models[contract.DIT_GUIDED]
    with make(transport) as client, pytest.raises(h.ModelNotReady, match="hint: .*health") as error:
        client.denoise(LATENTS, 0.5, tokens(), guidance_scale=4)
    assert (error.value.status, error.value.model) == (grpc.StatusCode.NOT_FOUND, contract.DIT_GUIDED)


def test_a_redeployed_model_is_noticed(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with make(transport) as client:
        client.denoise(LATENTS, 0.5, tokens())
        with pytest.raises(h.InvalidInput, match="guidance must be left out"):
            client.denoise(LATENTS, 0.5, tokens(), guidance=3)
        plain = transport.models[contract.DIT]
        guidance = {**plain.inputs, "guidance": h.InputInfo("FP32", (-1, 1))}
        transport.models[contract.DIT] = dataclasses.replace(plain, inputs=guidance)
        client.denoise(LATENTS, 0.5, tokens(), guidance=3)
    assert transport.requests[-1].inputs["guidance"].shape == (1, 1)


def test_sample_and_stream(tokens: Tokens) -> None:
    transport = h.MockTransport()
    with make(transport) as client:
        assert client.sample(tokens(2), steps=4, num_latents=7).shape == (2, 7, 64)
        steps = list(client.stream(tokens()[0], steps=5, num_latents=7, preview_every=2))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5] and {step.total for step in steps} == {5}
    assert [step.index for step in steps if step.latents is not None] == [2, 4, 5]
    assert [request.inputs["preview_every"][0] for request in transport.requests] == [0, 2]


def test_stream_checks_its_arguments_at_once(tokens: Tokens) -> None:
    with make(h.MockTransport()) as client, pytest.raises(h.InvalidInput, match="steps"):
        client.stream(tokens(), steps=0)


@pytest.mark.parametrize("answers", [0, 2])
def test_a_trajectory_cut_short_is_an_error(answers: int, tokens: Tokens) -> None:
    whole = h.MockTransport()

    def cut(request: h.Request) -> Iterator[Tensors]:
        yield from list(whole._answer(request))[:answers]

    with make(h.MockTransport(cut)) as client, pytest.raises(h.ModelFailed, match="must end with") as error:
        client.sample(tokens(), steps=4)
    assert error.value.request_id and error.value.model == contract.SAMPLER


def leave_by_break(steps: Iterator[h.Step]) -> None:
    for _ in steps:
        break


def leave_by_exception(steps: Iterator[h.Step]) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in steps:
            1 / 0  # noqa: B018


def leave_by_collection(steps: Iterator[h.Step]) -> None:
    next(steps)
    del steps
    gc.collect()


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_exception, leave_by_collection])
def test_leaving_a_stream_early_cancels_it(leave: Callable[[Iterator[h.Step]], None], tokens: Tokens) -> None:
    transport = h.MockTransport()
    with make(transport, max_in_flight=1) as client:
        leave(client.stream(tokens(), steps=50))
        assert client.health().live  # needs the slot: the cancelled stream has given it back
        assert transport.cancelled == [transport.requests[0].request_id]


def test_leaving_an_async_stream_early_cancels_it(tokens: Tokens) -> None:
    transport = h.MockTransport()

    async def main() -> None:
        async with h.AsyncClient(transport=transport, max_in_flight=1) as client:
            async for step in client.stream(tokens(), steps=50):
                assert step.index == 1
                break
            await client.health()
            assert transport.cancelled == [transport.requests[0].request_id]

    asyncio.run(main())


def test_cancelling_a_task_cancels_its_request(tokens: Tokens) -> None:
    async def main() -> None:
        transport = Stalled()
        async with h.AsyncClient(transport=transport) as client:
            task = asyncio.create_task(client.denoise(LATENTS, 0.5, tokens()))
            while not transport.started.acquire(blocking=False):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(transport.cancelled) == 1

    asyncio.run(main())


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.usefixtures("quick")
def test_refused_requests_are_sent_again(status: grpc.StatusCode, tokens: Tokens) -> None:
    transport = Failing(status, status)
    with make(transport, retries=2) as client:
        client.denoise(LATENTS, 0.5, tokens())
    assert len(transport.requests) == 3 and len({request.request_id for request in transport.requests}) == 1


@pytest.mark.usefixtures("quick")
def test_retries_end(tokens: Tokens) -> None:
    transport = Failing(*[grpc.StatusCode.UNAVAILABLE] * 9)
    with make(transport, retries=1) as client, pytest.raises(h.Overloaded) as error:
        client.denoise(LATENTS, 0.5, tokens())
    assert error.value.attempt == 2 == len(transport.requests) and 0 < error.value.retry_after_s < 1
    assert error.value.request_id == transport.requests[0].request_id


@pytest.mark.parametrize("status", sorted(set(h.errors.BY_STATUS), key=str) + [None])
@pytest.mark.usefixtures("quick")
def test_only_refused_requests_are_sent_again(status: grpc.StatusCode | None, tokens: Tokens) -> None:
    safe = status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    transport = Failing(status)
    with make(transport, retries=0) as client, pytest.raises(h.Hunyuan3DError) as error:
        client.denoise(LATENTS, 0.5, tokens())
    expected = h.Overloaded if safe else h.ModelFailed if status is None else h.errors.BY_STATUS[status]
    assert type(error.value) is expected and error.value.status is status and error.value.attempt == 1
    assert isinstance(error.value.__cause__, h.StatusError) and "\nhint: " in str(error.value)
    transport = Failing(status)
    with make(transport, retries=1) as client:
        if safe:
            client.denoise(LATENTS, 0.5, tokens())
        else:
            with pytest.raises(expected):
                client.denoise(LATENTS, 0.5, tokens())
    assert len(transport.requests) == 1 + safe


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, None])
def test_a_failure_while_the_model_is_not_ready(status: grpc.StatusCode | None, tokens: Tokens) -> None:
    transport = Failing()
    with make(transport) as client:
        client.denoise(LATENTS, 0.5, tokens())
        transport.models[contract.DIT] = dataclasses.replace(transport.models[contract.DIT], ready=False)
        transport._statuses = [status]
        with pytest.raises(h.ModelNotReady) as error:
            client.denoise(LATENTS, 0.5, tokens())
    assert error.value.status is status and len(transport.requests) == 2


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_refusal_after_the_deadline_is_a_deadline(status: grpc.StatusCode, tokens: Tokens) -> None:
    late = threading.Event()

    def slow(_: h.Request) -> Iterable[Tensors]:
        late.wait(0.05)
        raise h.StatusError(status, "the server was first to notice")

    with make(h.MockTransport(slow)) as client, pytest.raises(h.DeadlineExceeded) as error:
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=0.03)
    assert error.value.status is status


@pytest.mark.usefixtures("quick")
def test_a_stream_that_broke_is_not_sent_again(tokens: Tokens) -> None:
    whole = h.MockTransport()

    def broken(request: h.Request) -> Iterator[Tensors]:
        yield from list(whole._answer(request))[:1]
        raise h.StatusError(grpc.StatusCode.UNAVAILABLE, "socket closed")

    transport = h.MockTransport(broken)
    with make(transport, retries=5) as client, pytest.raises(h.ServerUnavailable):
        client.sample(tokens())
    assert len(transport.requests) == 1


def test_deadlines(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with make(transport, timeout_s=50) as client:
        client.denoise(LATENTS, 0.5, tokens())
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=20)
    assert 49 < transport.timeouts_s[0] <= 50 and 19 < transport.timeouts_s[1] <= 20


def test_a_deadline_that_passes_before_the_call_starts(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with make(transport) as client, pytest.raises(h.DeadlineExceeded, match="hint: raise timeout_s"):
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=1e-9)
    gc.collect()
    assert not transport.requests


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "3"])
def test_bad_timeouts(timeout_s: Any, tokens: Tokens) -> None:
    with make(h.MockTransport()) as client, pytest.raises(h.InvalidInput, match="timeout_s must be"):
        client.sample(tokens(), timeout_s=timeout_s)


@pytest.mark.parametrize("options", [{"max_in_flight": 0}, {"retries": -1}])
def test_bad_client_options(options: dict[str, int]) -> None:
    with pytest.raises(h.InvalidInput):
        make(h.MockTransport(), **options)


def test_requests_in_flight_are_bounded(tokens: Tokens) -> None:
    transport = Stalled()
    with make(transport, max_in_flight=2) as client:
        client.model_info(contract.DIT)
        threads = [threading.Thread(target=client.denoise, args=(LATENTS, 0.5, tokens())) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert transport.started.acquire(timeout=10) and transport.started.acquire(timeout=10)
        with pytest.raises(h.DeadlineExceeded, match="max_in_flight"):
            client.denoise(LATENTS, 0.5, tokens(), timeout_s=0.05)
        assert not transport.started.acquire(blocking=False)
        client._loop._loop.call_soon_threadsafe(transport.go.set)
        for thread in threads:
            thread.join()
        client.denoise(LATENTS, 0.5, tokens())


def test_closing_stops_calls_in_flight(tokens: Tokens) -> None:
    transport = Stalled()
    client = make(transport)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            client.denoise(LATENTS, 0.5, tokens())
        except h.Hunyuan3DError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert transport.started.acquire(timeout=10)
    client.close()
    thread.join()
    assert [type(error) for error in caught] == [h.Cancelled]


def test_a_closed_client_says_so(tokens: Tokens) -> None:
    client = make(h.MockTransport())
    client.close()
    client.close()
    with pytest.raises(h.Cancelled, match="must be open"):
        client.sample(tokens())

    async def main() -> None:
        lone = h.AsyncClient(transport=h.MockTransport())
        await lone.close()
        with pytest.raises(h.Cancelled, match="must be open"):
            await lone.sample(tokens())

    asyncio.run(main())


def test_a_forgotten_client_ends_its_thread() -> None:
    before = threading.active_count()
    client = make(h.MockTransport())
    assert threading.active_count() == before + 1
    del client
    gc.collect()
    assert threading.active_count() == before


def test_job(tokens: Tokens) -> None:
    with make(h.MockTransport()) as client:
        ended = threading.Event()
        job = client.submit(tokens(), steps=4, num_latents=5)
        job.add_done_callback(lambda done: ended.set() if done is job else None)
        assert job.result(timeout_s=10).shape == (1, 5, 64) and job.done() and not job.cancel()
        assert ended.wait(10) and job.progress is not None and (job.progress.index, job.progress.total) == (4, 4)


def test_job_cancelled_and_late(tokens: Tokens) -> None:
    transport = Stalled()
    with make(transport) as client:
        job = client.submit(tokens())
        assert transport.started.acquire(timeout=10)
        with pytest.raises(TimeoutError, match="the job must end") as error:
            job.result(timeout_s=0.01)
        assert not isinstance(error.value, h.DeadlineExceeded) and not job.done()
        assert job.cancel() and job.done()
        with pytest.raises(h.Cancelled):
            job.result()
        client.health()
        assert len(transport.cancelled) == 1


def test_job_reports_its_own_error(tokens: Tokens) -> None:
    with make(Failing(grpc.StatusCode.DEADLINE_EXCEEDED)) as client, pytest.raises(h.DeadlineExceeded):
        client.submit(tokens()).result(timeout_s=10)


def test_the_clients_own_thread_must_not_call_it(tokens: Tokens) -> None:
    transport = Stalled()
    caught: list[BaseException] = []
    ended = threading.Event()

    def callback(_: h.Job) -> None:
        try:
            client.health()
        except RuntimeError as error:
            caught.append(error)
        ended.set()

    with make(transport) as client:
        job = client.submit(tokens())
        job.add_done_callback(callback)
        client._loop._loop.call_soon_threadsafe(transport.go.set)
        assert ended.wait(10) and "other threads" in str(caught[0])


def test_model_info_and_health() -> None:
    with make(h.MockTransport()) as client:
        assert client.model_info(contract.DIT).inputs["latents"] == h.InputInfo("FP32", (-1, -1, 64))
        state = client.health(timeout_s=5)
    assert state.live and state.ready and {model.name for model in state.models} == set(contract.MODELS)


# Every option of sampling, each with a value whose effect on the request the test below looks for.
OPTIONS: dict[str, Any] = {
    "steps": 2,
    "guidance_scale": 2.5,
    "seed": 5,
    "num_latents": 9,
    "latents": LATENTS,
    "negative_context": np.ones((1, 5, 1536), np.float16),
    "schedule": "flow_match",
    "preview_every": 3,
    "timeout_s": 7.0,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_sampling_changes_the_request(name: str, tokens: Tokens) -> None:
    seen = []
    for options in ({}, {name: OPTIONS[name]}):
        transport = h.MockTransport()
        with make(transport) as client:
            list(client.stream(tokens(), **options))
            if name != "preview_every":
                client.sample(tokens(), **options)
        values = [request.inputs[name].tolist() if name in request.inputs else None for request in transport.requests]
        seen.append([round(value) for value in transport.timeouts_s] if name == "timeout_s" else values)
    assert all(before != after for before, after in zip(seen[0], seen[1], strict=True))


def test_options_of_the_methods_are_those_tested_and_equal_in_both_clients() -> None:
    parameters = {name: set(inspect.signature(getattr(h.Client, name)).parameters) for name in ("sample", "stream", "submit")}
    assert parameters["stream"] == parameters["submit"] == {"self", "context", *OPTIONS}
    assert parameters["sample"] == parameters["stream"] - {"preview_every"}
    for name, method in vars(h.AsyncClient).items():
        if not name.startswith("_") and name != "close":
            assert inspect.signature(method).parameters.keys() == inspect.signature(getattr(h.Client, name)).parameters.keys()
    for method in (h.Client.denoise, h.Client.stream, h.Client.sample):
        kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 4
    assert inspect.signature(h.Client).parameters == inspect.signature(h.AsyncClient).parameters
