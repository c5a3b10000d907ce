"""The entrypoint refuses wrong settings with a message, drains on SIGTERM and writes logs that a machine can read."""

from __future__ import annotations

import http.server
import json
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from hunyuan3d_client import Client
from hunyuan3d_client.errors import DeadlineExceeded, Hunyuan3DError, ServerUnavailable

CONTEXT = np.ones((1, 3, 1536), np.float16)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRPC_PORT": "http"}, "GRPC_PORT must be in 1..65535, got 'http'"),
        ({"HTTP_PORT": "0"}, "HTTP_PORT must be in 1..65535, got '0'"),
        ({"METRICS_PORT": "65536"}, "METRICS_PORT must be in 1..65535, got '65536'"),
        ({"HEALTH_PORT": "-8003"}, "HEALTH_PORT must be in 1..65535, got '-8003'"),
        ({"NOTICE_S": "601"}, "NOTICE_S must be in 0..600, got '601'"),
        ({"EXIT_TIMEOUT_S": "-1"}, "EXIT_TIMEOUT_S must be in 0..86400, got '-1'"),
        ({"CONFIG": "gpu"}, "CONFIG must be default, cpu, onnxruntime or torch, got 'gpu'"),
        ({"CONFIG": "default"}, "hunyuan3d_dit must have a deployed model.plan for CONFIG=default"),
        ({"CONFIG": "torch"}, "hunyuan3d_dit must have a deployed checkpoint.safetensors for CONFIG=torch"),
        ({"OTEL_TRACES_RATE": "0"}, "OTEL_TRACES_RATE must be in 1..999999, got '0'"),
        ({"LOG_FORMAT": "xml"}, "LOG_FORMAT must be text or json, got 'xml'"),
        ({"MODEL_REPOSITORY": "/nowhere"}, "MODEL_REPOSITORY must be a model repository, got '/nowhere'"),
        ({"API_KEY_FILE": "/nowhere"}, "API_KEY_FILE must be a readable, non-empty file, got '/nowhere'"),
        ({"TLS_KEY_FILE": "/nowhere"}, "TLS_CERT_FILE must be a readable, non-empty file, got ''"),
        ({"TLS_CLIENT_CA_FILE": "/nowhere"}, "TLS_CERT_FILE must be a readable, non-empty file, got ''"),
    ],
)
def test_wrong_settings(environment: dict[str, str], message: str, image: Path, settings: dict[str, str]) -> None:
    done = subprocess.run(
        [image / "entrypoint.sh"],
        env={"PATH": "/usr/bin:/bin", **settings, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"error: {message}" in done.stderr and "\nhint: " in done.stderr


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_repository_without_plans_says_what_to_run(code: str, image: Path, settings: dict[str, str]) -> None:
    """Under compose, which sets the code to 0, Docker does not restart the container."""
    done = started(image, settings, CONFIG="default", REFUSAL_EXIT_CODE=code)
    assert done.returncode == int(code) and done.stdout == ""
    hint = done.stderr.partition("\nhint: ")[2]
    commands = [f"docker compose --profile export run --rm export {command}" for command in ("engine", "deploy")]
    assert all(command in hint for command in commands), done.stderr


@pytest.fixture
def gpu_image(root: Path, tmp_path: Path) -> Path:
    """/opt/hunyuan3d of the GPU image, and a tritonserver that prints its flags."""
    text = (root / "docker" / "server.Dockerfile").read_text().replace("\\\n", "")
    (tmp_path / "opt" / "bin").mkdir(parents=True)
    for source in " ".join(re.findall(r"^COPY (.*) /opt/hunyuan3d/$", text, re.MULTILINE)).split():
        shutil.copy2(root / source, tmp_path / "opt")
    (tmp_path / "opt" / "bin" / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "opt" / "bin" / "tritonserver").chmod(0o755)
    return tmp_path / "opt"


@pytest.fixture
def plans(repository: Path, tmp_path: Path) -> Path:
    """The deployed repository with an empty plan of TensorRT 11.1.0.106 in place of each graph of a denoiser."""
    models = Path(shutil.copytree(repository, tmp_path / "models"))
    for folder in models.glob("hunyuan3d_dit*"):
        (folder / "1" / "model.onnx").rename(folder / "1" / "model.plan")
        made_from = {"library_version": "11.1.0.106", "version_compatible": False}
        (folder / "1" / "manifest.json").write_text(json.dumps({"made_from": made_from}))
    return models


def test_no_image_has_torch_and_the_start_says_so(
    repository: Path, image: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    models = Path(shutil.copytree(repository, tmp_path / "models"))
    (models / "hunyuan3d_dit" / "1" / "checkpoint.safetensors").touch()
    done = started(image, settings, CONFIG="torch", MODEL_REPOSITORY=str(models), PATH=f"{no_torch(tmp_path)}:/usr/bin:/bin")
    assert done.returncode == 2 and "error: CONFIG=torch must run where torch and hunyuan3d_export are installed" in done.stderr
    assert "\nhint: use CONFIG=default or cpu" in done.stderr


def no_torch(folder: Path) -> Path:
    """A folder with a python3 that has the standard library alone, as in an image."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (folder / "bin" / "python3").chmod(0o755)
    return folder / "bin"


@pytest.mark.parametrize(("drain_s", "last_s"), [("0", "0"), ("9", "9"), ("600", "15")])
def test_tritons_own_shutdown_is_short(drain_s: str, last_s: str, gpu_image: Path, settings: dict[str, str]) -> None:
    """The samples have ended by then, so a second wait of EXIT_TIMEOUT_S would only outlast the grace period."""
    done = started(gpu_image, settings, TRITON_HOME=str(gpu_image), EXIT_TIMEOUT_S=drain_s)
    assert f"--exit-timeout-secs={last_s}" in done.stdout.splitlines(), done.stderr


def started(image: Path, settings: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": "/usr/bin:/bin", **settings, **environment}
    return subprocess.run([image / "entrypoint.sh"], env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_plan_of_another_tensorrt_is_refused_before_triton_sees_it(
    code: str, gpu_image: Path, plans: Path, settings: dict[str, str]
) -> None:
    here = {"CONFIG": "default", "TRITON_HOME": str(gpu_image), "MODEL_REPOSITORY": str(plans), "REFUSAL_EXIT_CODE": code}
    done = started(gpu_image, settings, **here, TENSORRT_VERSION="11.3.0")
    assert done.returncode == int(code) and done.stdout == "", "tritonserver was not started"
    assert "must be built by the server image's TensorRT 11.3.0, got 11.1.0.106\nhint: docker compose" in done.stderr
    done = started(gpu_image, settings, **here, TENSORRT_VERSION="11.1.0")
    assert done.returncode == 0 and "--model-config-name=default" in done.stdout, done.stderr
    assert "version-compatible" not in done.stdout
    for manifest in plans.glob("hunyuan3d_dit*/1/manifest.json"):
        manifest.write_text(manifest.read_text().replace("false", "true"))
    done = started(gpu_image, settings, **here, TENSORRT_VERSION="11.3.0")
    assert "--backend-config=tensorrt,version-compatible=true" in done.stdout.splitlines(), done.stderr


def test_the_pool_of_a_gpu_is_as_large_as_the_deployed_tensors_need(
    gpu_image: Path, plans: Path, settings: dict[str, str]
) -> None:
    facts = json.loads((plans / "hunyuan3d_sampler" / "1" / "preset.json").read_text())
    flag = f"--cuda-memory-pool-byte-size=0:{facts['cuda_memory_pool_bytes']}"
    here = {"CONFIG": "default", "TRITON_HOME": str(gpu_image), "MODEL_REPOSITORY": str(plans)}
    assert flag in started(gpu_image, settings, **here).stdout.splitlines()
    (plans / "hunyuan3d_sampler" / "1" / "preset.json").unlink()
    assert "--cuda-memory-pool" not in started(gpu_image, settings, **here).stdout
    on_cpu = started(gpu_image, settings, TRITON_HOME=str(gpu_image))
    assert on_cpu.returncode == 0 and "--cuda-memory-pool" not in on_cpu.stdout


def test_a_weak_key_is_refused_and_not_shown(tmp_path: Path, image: Path, settings: dict[str, str]) -> None:
    (tmp_path / "key").write_text("hunter2")
    done = subprocess.run(
        [image / "entrypoint.sh"],
        env={"PATH": "/usr/bin:/bin", **settings, "API_KEY_FILE": str(tmp_path / "key")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and "must hold at least 16 letters, digits, - or _, got 7 characters" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.served
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_sigterm_drains(log_format: str, run: Callable[..., Any]) -> None:
    """A running sample finishes, a new one is refused, exit code 0."""
    with run(LOG_FORMAT=log_format) as container:
        container.wait_ready()
        with Client(container.grpc, timeout_s=60, retries=0) as client:
            steps = client.stream(CONTEXT, num_latents=48, steps=300, preview_every=100)
            first = next(steps)
            container.process.send_signal(signal.SIGTERM)
            with pytest.raises(Hunyuan3DError):
                # The signal may arrive after a few more requests, but arrives well before the running sample's last step.
                while True:
                    client.sample(CONTEXT, num_latents=4, steps=1)
            last = list(steps)[-1]
        assert first.index < last.index == 300 and last.latents is not None
        assert container.wait() == 0
    if log_format == "json":
        records = [json.loads(line) for line in container.log]
        assert {"time", "level", "source", "message"} == set(records[0])
        assert any("Started GRPCInferenceService" in record["message"] for record in records)
        assert {record["level"] for record in records} >= {"info"}


@pytest.mark.served
def test_a_server_that_dies_before_its_last_sample_is_no_clean_stop(run: Callable[..., Any]) -> None:
    with run() as container:
        container.wait_ready()
        with Client(container.grpc, timeout_s=60, retries=0) as client:
            steps = client.stream(CONTEXT, num_latents=512, steps=1000)
            next(steps)
            container.process.send_signal(signal.SIGTERM)
            time.sleep(1.5)  # the server is draining after that
            (server,) = [child for child in psutil.Process(container.process.pid).children() if child.name() == "tritonserver"]
            server.kill()
            with pytest.raises(Hunyuan3DError):
                list(steps)
        # container.wait() would wait for the log too, which the models' processes hold open until they notice the end.
        assert container.process.wait(60) == 137


@pytest.mark.served
def test_a_request_after_the_end_is_unavailable(run: Callable[..., Any]) -> None:
    with run() as container:
        container.wait_ready()
        container.process.send_signal(signal.SIGTERM)
        assert container.wait() == 0
        with Client(container.grpc, timeout_s=5, retries=0) as client, pytest.raises(ServerUnavailable):
            client.sample(CONTEXT, num_latents=4, steps=1)


def test_glogs_lines_become_records(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "docker")
    from json_log import records

    lines = [
        'E1125 13:26:56.923197 6728 grpc_server.cc:2558] "it said \\"no\\""\n',
        "  a table's line\n",
        "\n",
        "W1125 13:26:56.923197 6728 pb_stub.cc:401] plain words\n",
        'I1125 13:26:56.923197 6728 server.cc:1] "unclosed\n',
        "I1125 13:26:56.923197 6728 model.py:1] request a-1 done: 3 steps\n",
        "I1125 13:26:56.923197 6728 infer.cc:1] [request id: a-1] Setting state\n",
        "I1125 13:26:56.923197 6728 infer.cc:1] [request id: <id_unknown>] Setting state\n",
        "I1125 13:26:56.923197 6728 model.py:1] request - done: 3 steps\n",
        "I1125 13:26:56.923197 6728 model.py:1] request 'a-1,b-2' failed: words\n",
        "I1125 13:26:56.923197 6728 model.py:1] request '' failed: words\n",
        "I1125 13:26:56.923197 6728 model.py:1] Request for unknown model: x\n",
        "I1125 13:26:56.923197 6728 model.py:1] request for unknown model: x\n",
        "I1125 13:26:56.923197 6728 infer.cc:1] [request id: order 66] Setting state\n",
    ]
    made = list(records(lines))
    assert [record.get("request_id") for record in made] == [
        *[None] * 4,
        "a-1",
        "a-1",
        None,
        None,
        "a-1,b-2",
        *[None] * 3,
        "order 66",
    ]
    found = [(record["level"], record["source"], record["message"]) for record in made[:4]]
    assert found == [
        ("error", "grpc_server.cc:2558", 'it said "no"'),
        ("error", "", "  a table's line"),
        ("warning", "pb_stub.cc:401", "plain words"),
        ("info", "server.cc:1", '"unclosed'),
    ]


@pytest.mark.served
def test_the_health_check(root: Path, run: Callable[..., Any]) -> None:
    def healthy(port: int, *arguments: str) -> int:
        command = ["python3", root / "docker" / "health.py", *arguments]
        return subprocess.run(command, env={"PATH": "/usr/bin:/bin", "HEALTH_PORT": str(port)}, timeout=30).returncode

    with run(NOTICE_S="2") as container:
        port = container.ports["HEALTH_PORT"]
        assert healthy(port) == 1, "the server cannot be ready yet"
        container.wait_ready()
        assert healthy(port) == healthy(port, "live") == 0
        container.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 2
        while healthy(port) == 0:
            assert time.monotonic() < deadline, "a server that is about to stop must not be ready"
        assert healthy(port, "live") == 0 and answers(f"{container.http}/v2/health/ready"), "Triton itself notices nothing yet"
        with Client(container.grpc, timeout_s=60, retries=0) as client:
            client.sample(CONTEXT, num_latents=4, steps=1)  # taken: proxies get time to learn of the stop
        assert container.wait() == 0


@pytest.mark.served
@pytest.mark.parametrize("model", ["hunyuan3d_sampler", "hunyuan3d_dit_guided"])
def test_a_server_whose_model_has_died_ends(model: str, run: Callable[..., Any]) -> None:
    """Docker and Kubernetes start it again. Triton itself goes on saying that it is ready."""
    with run(LOG_FORMAT="json") as container:
        container.wait_ready()
        (server,) = [child for child in psutil.Process(container.process.pid).children() if child.name() == "tritonserver"]
        (stub,) = [child for child in server.children() if f"/{model}/1/" in " ".join(child.cmdline())]
        stub.kill()
        begin = time.monotonic()
        while answers(f"{container.health}/live"):
            assert time.monotonic() - begin < 10, "the probes must see it"
            time.sleep(0.05)
        assert container.process.wait(30) == 137
        assert time.monotonic() - begin < 20
    assert any("the process of a model has died" in json.loads(line)["message"] for line in container.log)


def test_processes_that_have_died_are_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "docker")
    from guard import dead_stubs

    states = {
        "11": "(triton_python_b) Z 7 7",
        "12": "(triton_python_b) S 7 7",
        "13": "(triton_python_b) Z 8 8",
        "14": "(sh) Z 7 7",
        "15": "(odd) name) Z 7 7",
    }
    for process, text in states.items():
        (tmp_path / process).mkdir()
        (tmp_path / process / "stat").write_text(f"{process} {text} 0 -1")
    (tmp_path / "16").mkdir()
    assert dead_stubs(7, tmp_path) == [11]


@pytest.mark.parametrize(
    ("environment", "path", "host"),
    [
        ({}, "v2/health/ready", "127.0.0.1"),
        ({"BIND_ADDRESS": "0.0.0.0"}, "v2/health/ready", "127.0.0.1"),
        ({"BIND_ADDRESS": "10.0.0.5"}, "v2/health/ready", "10.0.0.5"),
        ({"BIND_ADDRESS": "10.0.0.5", "TLS_CERT_FILE": "/c"}, "v2/health/ready", "127.0.0.1"),
        ({"HTTP_ADDRESS": "10.0.0.6", "TLS_CERT_FILE": "/c"}, "v2/health/ready", "10.0.0.6"),
        ({"BIND_ADDRESS": "10.0.0.5", "TLS_CERT_FILE": "/c"}, "ready", "10.0.0.5"),
        ({"BIND_ADDRESS": "10.0.0.5", "HEALTH_ADDRESS": "10.0.0.8"}, "live", "10.0.0.8"),
        ({}, "ready", "127.0.0.1"),
        ({"BIND_ADDRESS": "10.0.0.5"}, "metrics", "10.0.0.5"),
        ({"BIND_ADDRESS": "10.0.0.5", "METRICS_ADDRESS": "10.0.0.7"}, "metrics", "10.0.0.7"),
    ],
)
def test_the_health_check_asks_where_the_server_listens(
    environment: dict[str, str], path: str, host: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(root / "docker")
    import health

    for name in ("BIND_ADDRESS", "HTTP_ADDRESS", "METRICS_ADDRESS", "HEALTH_ADDRESS", "TLS_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert health.host(path) == host


@pytest.mark.served
def test_a_requests_id_runs_through_the_log(run: Callable[..., Any]) -> None:
    """The id stands in the client's error and in the log lines of the sampler and the denoiser, streamed and unary."""
    with run("--log-verbose=1", LOG_FORMAT="json") as container:
        container.wait_ready()
        with InferenceServerClient(container.grpc) as raw:
            tensors = {
                "context": ("FP16", CONTEXT),
                "num_latents": ("INT32", np.array([16], np.int32)),
                "steps": ("INT32", np.array([3], np.int32)),
            }
            inputs = [InferInput(name, list(v.shape), kind).set_data_from_numpy(v) for name, (kind, v) in tensors.items()]
            raw.infer("hunyuan3d_sampler_unary", inputs, request_id="order 66\nI1125 forged")
            late_t = {"latents": CONTEXT[:, :, :64].astype(np.float32), "t": np.full((1, 1), 2, np.float32)}
            inputs = [InferInput("context", list(CONTEXT.shape), "FP16").set_data_from_numpy(CONTEXT)]
            inputs += [InferInput(name, list(v.shape), "FP32").set_data_from_numpy(v) for name, v in late_t.items()]
            with pytest.raises(InferenceServerException):
                raw.infer("hunyuan3d_dit", inputs, request_id="out of range")
        with Client(container.grpc, timeout_s=60, retries=0) as client:
            with pytest.raises(DeadlineExceeded) as late:
                client.sample(CONTEXT, num_latents=512, steps=1000, timeout_s=3)
        container.process.send_signal(signal.SIGTERM)
        assert container.wait() == 0
    said: dict[str, str] = {}
    for record in map(json.loads, container.log):
        name = record.get("request_id", "")
        said[name] = said.get(name, "") + record["message"] + "\n"
    own, client_own = "order?66?I1125?forged", str(late.value.request_id)
    assert f"request {own} done: 3 steps, path guided, B 1, L 16, T 3" in said[own]
    assert "model: hunyuan3d_dit_guided" in said[own], "Triton's own words at the denoiser's execution"
    assert "request 'out of range' failed: InvalidInput('t must be in [0, 1]" in said["out of range"]
    assert re.search(f"request {client_own} (cancelled|expired): ", said[client_own])
    assert "model: hunyuan3d_dit_guided" in said[client_own]


@pytest.mark.served
def test_requests_are_traced(run: Callable[..., Any]) -> None:
    """Spans of a sample, and of the denoiser's calls inside it, reach an OpenTelemetry collector."""
    received: queue.Queue[tuple[str, str]] = queue.Queue()

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((self.path, self.rfile.read(int(self.headers["content-length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        with run(OTEL_TRACES_URL=f"http://127.0.0.1:{collector.server_port}/v1/traces") as container:
            container.wait_ready()
            with Client(container.grpc, timeout_s=60) as client:
                client.sample(CONTEXT, num_latents=4, steps=2)
            path, body = received.get(timeout=60)
        collector.shutdown()
    assert path == "/v1/traces" and "hunyuan3d_sampler" in body
