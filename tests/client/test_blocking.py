"""The synchronous Client: leaving streams, closing, threads."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import client as client_module

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


def test_a_stream_is_closed_by_its_block(tokens: Tokens) -> None:
    transport = h.MockTransport()
    with h.Client(transport=transport, max_in_flight=1) as client:
        with client.stream(tokens(), steps=50) as steps:
            assert next(steps).index == 1
        client.sample(tokens())  # needs the only slot, which the closed stream has given back
        assert transport.cancelled == [transport.requests[0].request_id]
        assert list(steps) == []
        steps.close()


def test_a_stream_left_behind_says_nothing() -> None:
    """The variable outlives the client, as after `break` in a with block of the client alone."""
    code = """
import gc, numpy as np, hunyuan3d_client as h
transport = h.MockTransport()
with h.Client(transport=transport) as client:
    steps = client.stream(np.ones((1, 5, 1536), np.float16), steps=50)
    for step in steps:
        break
print(len(transport.cancelled))
del steps
gc.collect()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_stream_is_closed_by_another_thread(stalled: Any, tokens: Tokens) -> None:
    caught: list[BaseException] = []

    def follow(steps: h.Stream[h.Step]) -> None:
        try:
            next(steps)
        except h.Hunyuan3DError as error:
            caught.append(error)

    with h.Client(transport=stalled) as client:
        steps = client.stream(tokens())
        thread = threading.Thread(target=follow, args=(steps,))
        thread.start()
        assert stalled.started.acquire(timeout=10)
        steps.close()
        thread.join(10)
        assert [type(error) for error in caught] == [h.Cancelled] and stalled.left.acquire(timeout=10)


def test_an_ended_stream_stays_ended(failing: Any, tokens: Tokens) -> None:
    with h.Client(transport=h.MockTransport()) as client:
        steps = client.stream(tokens(), steps=2)
        assert [step.index for step in steps] == [1, 2] and list(steps) == []
    with h.Client(transport=failing(grpc.StatusCode.INTERNAL)) as client:
        steps = client.stream(tokens())
        with pytest.raises(h.ModelFailed):
            next(steps)
        assert list(steps) == []


def test_an_async_stream_is_closed_by_its_block(tokens: Tokens) -> None:
    transport = h.MockTransport()

    async def main() -> None:
        async with h.AsyncClient(transport=transport) as client, client.stream(tokens(), steps=50) as steps:
            assert (await anext(steps)).index == 1
            await steps.aclose()
            assert transport.cancelled == [transport.requests[0].request_id]

    asyncio.run(main())


def test_streams_are_typed() -> None:
    assert typing.get_type_hints(h.Client.stream)["return"] == h.Stream[h.Step]
    assert typing.get_type_hints(h.AsyncClient.stream, vars(client_module))["return"] == h.AsyncStream[h.Step]


def test_the_background_is_the_standard_librarys(tokens: Tokens) -> None:
    """Futures of any method; their callbacks run on the pool's threads, so a slow callback holds no other call up."""
    released = threading.Event()
    with h.Client(transport=h.MockTransport()) as client, ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.sample, tokens(), num_latents=5)
        future.add_done_callback(lambda _: released.wait(20))
        assert future.result(timeout=10).shape == (1, 5, 64) and future.exception() is None
        assert client.sample(tokens(), timeout_s=1).shape == (1, 512, 64)
        released.set()


def test_the_clients_own_thread_must_not_call_it() -> None:
    caught: list[BaseException] = []

    async def from_inside() -> None:
        try:
            client.health()
        except RuntimeError as error:
            caught.append(error)

    with h.Client(transport=h.MockTransport()) as client:
        client._loop.submit(from_inside()).result(timeout=10)
    assert "other threads" in str(caught[0])


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
