"""Two servers behind one client are restarted one after the other, under load."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hunyuan3d_client import Client, Hunyuan3DError

pytestmark = pytest.mark.served

CONTEXT = np.ones((1, 3, 1536), np.float16)
CALLERS = 4


def test_no_sample_fails(run: Callable[..., Any]) -> None:
    """Each server finishes its samples while the other takes the new samples. A restarted server is used again."""
    finished, failed, ended = [0] * CALLERS, [], threading.Event()

    def call(index: int, client: Client) -> None:
        while not ended.is_set():
            try:
                client.sample(CONTEXT, num_latents=16, steps=20, seed=index)
                finished[index] += 1
            except Hunyuan3DError as error:
                failed.append(error)

    with contextlib.ExitStack() as servers:
        pair = [servers.enter_context(run()) for _ in range(2)]
        for server in pair:
            server.wait_ready()
        with Client([server.grpc for server in pair], timeout_s=120) as client:
            callers = [threading.Thread(target=call, args=(index, client)) for index in range(CALLERS)]
            for caller in callers:
                caller.start()
            try:
                during = []
                for server in pair:
                    before = sum(finished)
                    server.process.send_signal(signal.SIGTERM)
                    code = server.wait()
                    assert code == 0, "\n".join(server.log[-60:])
                    again = servers.enter_context(run(**{name: str(port) for name, port in server.ports.items()}))
                    again.wait_ready()
                    until_it_serves(again)
                    during.append(sum(finished) - before)
            finally:
                ended.set()
                for caller in callers:
                    caller.join(120)
    assert failed == [] and min(finished) > 0 and min(during) > 0


def until_it_serves(server: Any) -> None:
    """Waits until the client uses the restarted server: a sample has ended there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=5) as answer:
            if re.search(r'^hunyuan3d_requests_total\{.*outcome="done".*\} [1-9]', answer.read().decode(), re.MULTILINE):
                return
        time.sleep(0.1)
    pytest.fail("the restarted server is not used again")
