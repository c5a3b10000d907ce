"""The sampler as a service: limits from its config, metrics, recovery when a denoiser is unloaded or killed."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hunyuan3d_client import Client, contract, noise
from hunyuan3d_client.errors import DeadlineExceeded, Hunyuan3DError, ModelFailed, ModelNotReady, Overloaded
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints, ServerOptions, ServerStartError

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]
WAIT_S = 60.0
LONG = {"num_latents": 512, "steps": 1000, "preview_every": 0}
SHORT = {"num_latents": 64, "steps": 3}
LIMITS = {
    "max_trajectories": "2",
    "max_queued": "1",
    "queue_timeout_s": "0.5",
    "total_timeout_s": "5",
    "evaluation_timeout_s": "2",
}


def configure(repository: Path, **parameters: str) -> None:
    """Sets parameters of the sampler in a deployed repository."""
    path = repository / contract.SAMPLER / "configs" / "cpu.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    path.write_text(text_format.MessageToString(config))


@pytest.fixture(scope="module")
def limited(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A server with small limits for this file alone, because its tests kill and unload the denoisers."""
    repository = tmp_path_factory.mktemp("limited") / "repository"
    deploy(artifacts(), repository)
    configure(repository, **LIMITS)
    # At its stop Triton waits for the model of a killed Python process: 3 s here instead of the usual 30 s.
    with EmbeddedServer(repository, ServerOptions(extra=["--exit-timeout-secs=3"])) as endpoints:
        yield endpoints


@pytest.fixture(scope="module")
def caller(limited: Endpoints) -> Iterator[Client]:
    with Client(limited.grpc, timeout_s=WAIT_S, retries=0) as client:
        yield client


def metrics(endpoints: Endpoints) -> dict[str, float]:
    """The sampler's metrics from /metrics: 'name{labels}' -> value."""
    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=WAIT_S) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("hunyuan3d_"))}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def idle(endpoints: Endpoints) -> bool:
    found = metrics(endpoints)
    return found["hunyuan3d_active_samples"] == found["hunyuan3d_queued_samples"] == 0


def process_of(endpoints: Endpoints, model: str) -> psutil.Process:
    """The newest Python process of a model, because the process of an unloaded model may live on for a moment."""
    found = [
        child for child in psutil.Process(endpoints.pid).children(recursive=True) if f"/{model}/" in " ".join(_words(child))
    ]
    return max(found, key=psutil.Process.create_time)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # the process has ended
        return []


def repository_call(endpoints: Endpoints, model: str, verb: str) -> None:
    url = f"http://{endpoints.http}/v2/repository/models/{model}/{verb}"
    with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=WAIT_S):
        pass


def test_one_waits_the_next_is_refused_and_waiting_has_an_end(
    caller: Client, limited: Endpoints, tokens: Make, background: Any
) -> None:
    before = metrics(limited)
    jobs = [background(caller, tokens(1, 64), **LONG) for _ in range(2)]
    until(lambda: metrics(limited)["hunyuan3d_active_samples"] == 2, "both must run")
    waiting = background(caller, tokens(1, 64), **LONG)
    until(lambda: metrics(limited)["hunyuan3d_queued_samples"] == 1, "the third must wait")
    with pytest.raises(Overloaded, match="within 2 and 1 queued, got 2 and 1 and 1 more") as refused:
        caller.sample(tokens(1, 64), **SHORT)
    assert refused.value.retry_after_s > 0
    with pytest.raises(DeadlineExceeded, match="begin within 0.5 s.*\n.*hint: raise queue_timeout_s"):
        waiting.result(timeout_s=WAIT_S)
    for job in jobs:
        with pytest.raises(DeadlineExceeded, match="end within 5 s.*\n.*hint: raise total_timeout_s"):
            job.result(timeout_s=WAIT_S)
    until(lambda: idle(limited), "all must have left")
    after = metrics(limited)
    changed = {name: after[name] - before.get(name, 0) for name in after if name.startswith("hunyuan3d_requests")}
    assert {name: value for name, value in changed.items() if value} == {
        'hunyuan3d_requests_total{outcome="expired"}': 3,
        'hunyuan3d_requests_total{outcome="rejected"}': 1,
    }


def test_the_queue_moves_up(caller: Client, limited: Endpoints, tokens: Make, background: Any) -> None:
    leaving, _ = jobs = [background(caller, tokens(1, 64), **LONG) for _ in range(2)]
    until(lambda: metrics(limited)["hunyuan3d_active_samples"] == 2, "both must run")
    waiting = background(caller, tokens(1, 64), **SHORT)
    until(lambda: metrics(limited)["hunyuan3d_queued_samples"] == 1, "the third must wait")
    leaving.cancel()
    assert waiting.result(timeout_s=WAIT_S).shape == (1, 64, 64)
    assert all(job.cancel() or True for job in jobs)
    until(lambda: idle(limited), "the others must leave")


def test_a_request_of_more_samples_than_are_stepped_is_done(caller: Client, tokens: Make) -> None:
    assert caller.sample(tokens(3, 5), **SHORT).shape == (3, 64, 64)


def test_metrics_move(client: Client, served: Endpoints, tokens: Make) -> None:
    until(lambda: idle(served), "an earlier test's trajectory still runs")
    before = metrics(served)
    client.sample(tokens(3, 5), num_latents=7, steps=5)
    until(lambda: idle(served), "it has ended")
    after = metrics(served)
    moved = {name.removeprefix("hunyuan3d_"): after[name] - before.get(name, 0) for name in after}
    moved = {name: value for name, value in moved.items() if value and "seconds" not in name}
    latents = 3 * 7 * 64 * 4
    assert moved == {
        "steps_total": 3 * 4,
        'evaluations_total{path="guided"}': 4,
        'requests_total{outcome="done"}': 1,
        "batch_rows_count": 4,
        "batch_rows_sum": 12,
        **{f'batch_rows_bucket{{le="{size}"}}': 4 for size in (4, 8, 16, 32, 64, "+Inf")},
        'moved_bytes_total{tensor="context"}': 3 * 5 * 1536 * 2,
        'moved_bytes_total{tensor="state"}': 4 * (latents + 3 * 8),
        'moved_bytes_total{tensor="velocity"}': 4 * latents,
        'moved_bytes_total{tensor="response"}': latents,
    }
    assert after["hunyuan3d_evaluation_seconds_count"] - before["hunyuan3d_evaluation_seconds_count"] == 4
    assert after["hunyuan3d_evaluation_seconds_sum"] > before["hunyuan3d_evaluation_seconds_sum"]


def test_the_noise_can_be_drawn_locally(client: Client, tokens: Make) -> None:
    drawn = client.sample(tokens(2, 5), num_latents=9, steps=4, seed=2**40)
    given = client.sample(tokens(2, 5), latents=noise(2**40, 9, batch=2), steps=4)
    np.testing.assert_array_equal(drawn, given)


def test_an_unloaded_denoiser_is_typed_and_the_sampler_comes_back(
    caller: Client, limited: Endpoints, tokens: Make, background: Any
) -> None:
    running = background(caller, tokens(1, 64), **LONG)
    until(lambda: running.progress is not None, "it must run")
    repository_call(limited, contract.DIT_GUIDED, "unload")
    repository_call(limited, contract.DIT, "unload")
    with pytest.raises(ModelNotReady, match="hunyuan3d_dit_guided must stay loaded, got unloaded"):
        running.result(timeout_s=WAIT_S)
    with pytest.raises(ModelNotReady, match="a denoiser for this request must be loaded"):
        caller.sample(tokens(1, 5), **SHORT)
    repository_call(limited, contract.DIT, "load")
    repository_call(limited, contract.DIT_GUIDED, "load")
    assert caller.sample(tokens(1, 5), **SHORT).shape == (1, 64, 64)


def test_a_killed_denoiser_is_typed_and_the_next_request_succeeds(
    caller: Client, limited: Endpoints, tokens: Make, background: Any
) -> None:
    for guidance_scale, model in ((5.0, contract.DIT_GUIDED), (1.0, contract.DIT)):
        running = [background(caller, tokens(1, 64), guidance_scale=guidance_scale, **LONG) for _ in range(2)]
        until(lambda running=running: all(job.progress is not None for job in running), "both must run")
        process_of(limited, model).send_signal(signal.SIGKILL)
        # The sample whose call was killed fails. A sample that waited goes on, until its time limit.
        errors = [job_error(job) for job in running]
        assert any(isinstance(error, ModelFailed) and f"{model} must answer" in str(error) for error in errors), errors
        assert all(isinstance(error, ModelFailed | DeadlineExceeded) for error in errors), errors
        assert caller.sample(tokens(1, 5), guidance_scale=guidance_scale, **SHORT).shape == (1, 64, 64)
    until(lambda: idle(limited), "nothing is left")


def test_a_denoiser_that_hangs_is_given_up(caller: Client, limited: Endpoints, tokens: Make) -> None:
    process = process_of(limited, contract.DIT_GUIDED)
    process.suspend()
    try:
        with pytest.raises(ModelFailed, match="hunyuan3d_dit_guided must answer"):
            caller.sample(tokens(1, 5), **SHORT)
        assert caller.sample(tokens(1, 5), **SHORT).shape == (1, 64, 64), "in a new process"
    finally:
        process.kill()  # Triton would wait in vain for the suspended process


def job_error(job: Any) -> Exception:
    with pytest.raises(Hunyuan3DError) as caught:
        job.result(timeout_s=WAIT_S)
    return caught.value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("lanes", "0", "lanes must be at least 1, got 0"), ("laness", "1", "parameters must be steps, .*, got .*laness")],
)
def test_a_wrong_parameter_stops_the_server_with_its_reason(
    name: str, text: str, message: str, artifacts: Callable[..., Path], tmp_path: Path
) -> None:
    deploy(artifacts(), tmp_path)
    configure(tmp_path, **{name: text})
    with pytest.raises(ServerStartError) as caught, EmbeddedServer(tmp_path):
        pass
    assert re.search(message, str(caught.value))


def test_it_serves_where_metrics_are_off(artifacts: Callable[..., Path], tmp_path: Path, tokens: Make) -> None:
    deploy(artifacts(), tmp_path)
    options = ServerOptions(extra=["--allow-metrics=false"])
    with EmbeddedServer(tmp_path, options) as endpoints, Client(endpoints.grpc, timeout_s=WAIT_S) as client:
        assert client.sample(tokens(1, 5), **SHORT).shape == (1, 64, 64)
        with pytest.raises(urllib.error.URLError):
            metrics(endpoints)
