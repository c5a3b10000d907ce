"""Two real servers behind one client: one is killed under load, and comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc

from hunyuan3d_client import Client, Hunyuan3DError, ServerUnavailable, contract
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints, ServerOptions

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]
WAIT_S = 120.0
WORKERS = 8


@dataclasses.dataclass
class Call:
    """One call of the load: when it started, when it ended, and its error."""

    started: float
    ended: float
    error: Exception | None


class Load:
    """WORKERS threads that sample and denoise, one call after the other, until told to stop."""

    def __init__(self, client: Client, tokens: np.ndarray, noise: np.ndarray) -> None:
        self._client, self._tokens, self._noise = client, tokens, noise
        self._stop = threading.Event()
        self.calls: list[Call] = []

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(WORKERS)
        self._done = [self._pool.submit(self._work, index) for index in range(WORKERS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def _work(self, index: int) -> None:
        while not self._stop.is_set():
            started, error = time.monotonic(), None
            try:
                if index % 2:
                    self._client.denoise(self._noise, 0.5, self._tokens)
                else:
                    self._client.sample(self._tokens, num_latents=8, steps=10, seed=index)
            except Hunyuan3DError as failure:
                error = failure
            self.calls.append(Call(started, time.monotonic(), error))

    def run(self, calls: int) -> None:
        """Returns when this many more calls have ended."""
        enough = len(self.calls) + calls
        until(lambda: len(self.calls) >= enough, f"{calls} more calls must end")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def kill(endpoints: Endpoints) -> None:
    """SIGKILL to a server and its stubs, which frees its ports at once."""
    server = psutil.Process(endpoints.pid)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def served(endpoints: Endpoints) -> int:
    """Requests that this server's denoiser has answered to callers and to its sampler."""
    with tritonclient.grpc.InferenceServerClient(endpoints.grpc) as raw:
        return sum(
            stats.inference_count
            for name in (contract.DIT, contract.DIT_GUIDED)
            for stats in raw.get_inference_statistics(name).model_stats
        )


@pytest.fixture
def repository(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    deploy(artifacts(), tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_server_dies_under_load_and_comes_back(
    repository: Path, stack: contextlib.ExitStack, tokens: Make, noise: Make
) -> None:
    first, second = (stack.enter_context(EmbeddedServer(repository)) for _ in range(2))
    client = stack.enter_context(Client([first.grpc, second.grpc], timeout_s=WAIT_S, shared_memory="auto"))
    with Load(client, tokens(1, 200), noise(1, 8)) as load:  # the context is large enough for shared memory
        load.run(40)
        assert served(first) > 0 and served(second) > 0, "calls take turns"
        assert not [call for call in load.calls if call.error]

        killed = time.monotonic()
        kill(first)
        alone = served(second)
        load.run(60)
        assert served(second) > alone

        ports = {f"{name}_port": int(getattr(first, name).rpartition(":")[2]) for name in ("grpc", "http", "metrics")}
        again = stack.enter_context(EmbeddedServer(repository, ServerOptions(**ports)))
        assert again.grpc == first.grpc
        until(lambda: served(again) > 20, "the server that came back must be used")
        load.run(40)

    failed = [call for call in load.calls if call.error]
    assert {type(call.error) for call in failed} <= {ServerUnavailable}
    assert len(failed) <= WORKERS and all(call.started <= killed for call in failed), "only what was in flight"
    assert sum(call.started > killed for call in load.calls) >= 100
