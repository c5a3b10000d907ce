"""The synchronous Client: leaving streams, closing, jobs, threads."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h

Tokens = Callable[..., np.ndarray]
LATENTS = np.ones((1, 3, 64), np.float32)


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
    with h.Client(transport=transport, max_in_flight=1) as client:
        leave(client.stream(tokens(), steps=50))
        client.sample(tokens())  # needs the only slot, which the cancelled stream must have given back
        assert transport.cancelled == [transport.requests[0].request_id]


def test_closing_stops_calls_in_flight(stalled: Any, tokens: Tokens) -> None:
    client = h.Client(transport=stalled)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            client.denoise(LATENTS, 0.5, tokens())
        except h.Hunyuan3DError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert stalled.started.acquire(timeout=10)
    client.close()
    thread.join()
    assert [type(error) for error in caught] == [h.Cancelled]


def test_a_closed_client_says_so(tokens: Tokens) -> None:
    client = h.Client(transport=h.MockTransport())
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
    client = h.Client(transport=h.MockTransport())
    assert threading.active_count() == before + 1
    del client
    gc.collect()
    assert threading.active_count() == before


def test_job(tokens: Tokens) -> None:
    with h.Client(transport=h.MockTransport()) as client:
        ended = threading.Event()
        job = client.submit(tokens(), steps=4, num_latents=5)
        job.add_done_callback(lambda done: ended.set() if done is job else None)
        assert job.result(timeout_s=10).shape == (1, 5, 64) and job.done() and not job.cancel()
        assert ended.wait(10) and job.progress is not None and (job.progress.index, job.progress.total) == (4, 4)


def test_job_cancelled_and_late(stalled: Any, tokens: Tokens) -> None:
    with h.Client(transport=stalled) as client:
        job = client.submit(tokens())
        assert stalled.started.acquire(timeout=10)
        with pytest.raises(TimeoutError, match="the job must end") as error:
            job.result(timeout_s=0.01)
        assert not isinstance(error.value, h.DeadlineExceeded) and not job.done()
        assert job.cancel() and job.done()
        with pytest.raises(h.Cancelled):
            job.result()
        assert stalled.left.acquire(timeout=10)


def test_job_reports_its_own_error(failing: Any, tokens: Tokens) -> None:
    with h.Client(transport=failing(grpc.StatusCode.DEADLINE_EXCEEDED)) as client, pytest.raises(h.DeadlineExceeded):
        client.submit(tokens()).result(timeout_s=10)


def test_the_clients_own_thread_must_not_call_it(stalled: Any, tokens: Tokens) -> None:
    caught: list[BaseException] = []
    ended = threading.Event()

    def callback(_: h.Job) -> None:
        try:
            client.health()
        except RuntimeError as error:
            caught.append(error)
        ended.set()

    with h.Client(transport=stalled) as client:
        job = client.submit(tokens())
        job.add_done_callback(callback)
        client._loop._loop.call_soon_threadsafe(stalled.go.set)
        assert ended.wait(10) and "other threads" in str(caught[0])


def test_an_interrupt_cancels_the_request(stalled: Any, tokens: Tokens) -> None:
    main = threading.main_thread().ident
    interrupted = threading.Event()

    def interrupt() -> None:
        stalled.started.acquire(timeout=10)
        deadline = time.monotonic() + 10
        while sys._current_frames()[main].f_code.co_name != "wait" and time.monotonic() < deadline:
            time.sleep(0.001)
        while not interrupted.is_set() and time.monotonic() < deadline:
            signal.pthread_kill(main, signal.SIGINT)  # Python loses a signal just before the wait begins
            interrupted.wait(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    with h.Client(transport=stalled) as client:
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                client.denoise(LATENTS, 0.5, tokens())
            interrupted.set()
        finally:
            signal.signal(signal.SIGINT, before)
            thread.join()
        assert stalled.left.acquire(timeout=10)


def test_a_traceback_shows_the_call_and_the_message() -> None:
    """Not the frames of the client's own thread, in which the message would drown. The causes stay for programs."""

    def refuse(_request: Any) -> Any:
        raise h.StatusError(grpc.StatusCode.INVALID_ARGUMENT, "image must hold 1 picture, got 2\nhint: --views 4")

    with h.Client(transport=h.MockTransport(refuse)) as client, pytest.raises(h.InvalidInput) as caught:
        list(client.generate_stream([b"front", b"left"]))
    shown = "".join(traceback.format_exception(caught.value))
    assert "exchange.py" not in shown and len(shown.splitlines()) < 25
    assert shown.rstrip().endswith("hint: --views 4") and isinstance(caught.value.__cause__, h.StatusError)
