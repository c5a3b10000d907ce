"""The real tritonserver as a child process: it starts, says why it does not, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hunyuan3d_client import Client, Hunyuan3DError, contract
from hunyuan3d_export.repository_from_artifacts import DeployError, deploy, deploy_checkpoint
from hunyuan3d_export.server import wheel
from hunyuan3d_export.server.embedded import EmbeddedServer, ServerOptions, ServerStartError, _command

WAIT_S = 90.0


@pytest.fixture
def repository(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    deploy(artifacts(), tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is already in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def nothing_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No child process and no file in the temporary folder may outlive the test."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = set(psutil.Process().children(recursive=True))
    yield
    children = set(psutil.Process().children(recursive=True)) - before
    assert [child for child in children if child.status() != psutil.STATUS_ZOMBIE] == []
    assert list(temporary.iterdir()) == []


def ready(http: str) -> bool:
    with urllib.request.urlopen(f"http://{http}/v2/health/ready", timeout=10) as answer:
        return answer.status == 200


@pytest.mark.served
@pytest.mark.usefixtures("nothing_left")
def test_starts_and_stops(repository: Path) -> None:
    server = EmbeddedServer(repository)
    with server as endpoints:
        ports = [address.rpartition(":")[2] for address in (endpoints.grpc, endpoints.http, endpoints.metrics)]
        assert len(set(ports)) == 3 and ready(endpoints.http)
        process = psutil.Process(endpoints.pid)
        family = [process, *process.children(recursive=True)]
        assert "tritonserver" in process.name() and len(family) > 4, "a stub for each Python model"
        with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=10) as answer:
            assert b"nv_inference_count" in answer.read()
        for name in (contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY):
            with urllib.request.urlopen(f"http://{endpoints.http}/v2/models/{name}/ready", timeout=10) as answer:
                assert answer.status == 200
    _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert alive == []
    server.stop()  # the second stop changes nothing


@pytest.mark.served
@pytest.mark.usefixtures("nothing_left")
def test_models_import_from_a_relative_pythonpath(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, text in (("first", "right = True"), ("second", "right = False")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "only_here.py").write_text(text)
    (tmp_path / "einops.py").write_text("raise RuntimeError('a file of the folder in which the user stands')")
    model = repository / contract.SAMPLER / "1" / "model.py"
    text = model.read_text()
    model.unlink()
    model.write_text(f"{text}\nimport einops, only_here\nassert only_here.right\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "first:second")
    with EmbeddedServer(Path("repository")) as endpoints:
        assert ready(endpoints.http)


@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
@pytest.mark.usefixtures("nothing_left")
def test_a_taken_port(name: str, taken: int, repository: Path) -> None:
    server = EmbeddedServer(repository, ServerOptions(**{f"{name}_port": taken}))
    with pytest.raises(ServerStartError, match=f"^{name} port must be free, got {taken}: .*\nhint: pass --{name}-port 0"):
        server.start()


@pytest.mark.usefixtures("nothing_left")
def test_nothing_deployed(repository: Path) -> None:
    for model in (contract.DIT, contract.DIT_GUIDED):
        (repository / model / "1" / "model.onnx").unlink()
    with pytest.raises(DeployError, match="must hold a deployed model.onnx for config cpu, found none\nhint: "):
        EmbeddedServer(repository).start()


@pytest.mark.served
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda model: model.write_text("raise RuntimeError('the model is broken on purpose')\n"),
            "the model is broken on purpose",
        ),
        (lambda model: (model.parents[1] / "configs" / "cpu.pbtxt").write_text("max_batch_size: many"), "cpu.pbtxt"),
    ],
    ids=["code", "config"],
)
def test_a_server_that_dies_shows_its_last_words(break_it: Callable[[Path], object], words: str, repository: Path) -> None:
    break_it(repository / contract.SAMPLER / "1" / "model.py")
    with pytest.raises((ServerStartError, ValueError)) as caught:
        EmbeddedServer(repository).start()
    assert words in str(caught.value)


@pytest.mark.served
@pytest.mark.usefixtures("nothing_left")
def test_a_parameter_that_is_not_known_stops_the_start(repository: Path) -> None:
    config = repository / contract.SAMPLER / "configs" / "cpu.pbtxt"
    config.write_text(config.read_text().replace('key: "steps"', 'key: "step_count"'))
    with pytest.raises(
        ServerStartError, match="(?s)must stay up, got exit code .*parameters must be steps, .* got .*step_count"
    ):
        EmbeddedServer(repository).start()


@pytest.mark.served
@pytest.mark.usefixtures("nothing_left")
def test_not_ready_in_time(repository: Path) -> None:
    (repository / contract.SAMPLER / "1" / "model.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(ServerStartError, match="must be ready within 2 s\nlast log lines:\n"):
        EmbeddedServer(repository, ServerOptions(ready_timeout_s=2)).start()


def test_a_platform_without_the_wheel(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(wheel.platform, "machine", lambda: "aarch64")
    with pytest.raises(ServerStartError, match="must run on linux x86_64, got linux aarch64\nhint: .*official Triton image"):
        EmbeddedServer(repository).start()


@pytest.mark.parametrize("version", ["2.0.0", "2.5.2"])
def test_numpy_2_is_refused(version: str, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(wheel.importlib.metadata, "version", {"numpy": version}.__getitem__)
    with pytest.raises(
        ServerStartError, match=rf"numpy must be below 2 for the embedded server, found {version}\nhint: .* 'numpy<2'$"
    ):
        EmbeddedServer(repository).start()


def test_the_wheel_is_missing(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ServerStartError,
        match=r"nvidia-pytriton must be installed, found none\nhint: .* -m pip install '\.\[export,embedded\]'",
    ):
        EmbeddedServer(repository).start()


def test_a_server_that_may_use_a_gpu_gets_the_pool_that_the_tensors_need(micro: Any, tmp_path: Path) -> None:
    deploy_checkpoint(micro, tmp_path / "torch")
    facts = json.loads((tmp_path / "torch" / contract.SAMPLER / "1" / "preset.json").read_text())
    for config, flags in (("torch", [f"--cuda-memory-pool-byte-size=0:{facts['cuda_memory_pool_bytes']}"]), ("cpu", [])):
        command = _command(tmp_path / "bin" / "tritonserver", tmp_path / "torch", [], (1, 2, 3), ServerOptions(config=config))
        assert [flag for flag in command if "memory-pool" in flag] == flags


def serve(repository: Path) -> subprocess.Popen[str]:
    free = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    command = [sys.executable, "-m", "hunyuan3d_export", "serve", f"--repository={repository}", *free]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.served
@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], pytest.param([signal.SIGTERM, signal.SIGINT], marks=pytest.mark.slow)], ids=str
)
def test_the_command_says_where_it_listens_and_ends_on_a_signal(signals: list[signal.Signals], repository: Path) -> None:
    with serve(repository) as command:
        assert command.stdout is not None
        endpoints = json.loads(command.stdout.readline())
        assert list(endpoints) == ["grpc", "http", "metrics", "pid"] and ready(endpoints["http"])
        family = psutil.Process(command.pid).children(recursive=True)
        assert endpoints["pid"] in {child.pid for child in family}
        assert command.stderr is not None
        for each in signals:
            command.send_signal(each)
            while "stopping" not in command.stderr.readline() and each is signals[0]:
                assert command.poll() is None
        command.stderr.read()
        assert command.wait(WAIT_S) == 0
        assert command.stdout.read() == "", "one line, for a script to read"
    _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert alive == []


@pytest.mark.served
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "mid-sample"])
def test_the_command_ends_with_a_killed_server_and_says_so(busy: bool, repository: Path) -> None:
    """As after an out-of-memory kill: the models' processes outlive the server and hold the pipe of its log."""
    context = np.zeros((1, 40, 1536), np.float16)
    with serve(repository) as command:
        assert command.stdout is not None and command.stderr is not None
        endpoints = json.loads(command.stdout.readline())
        family = psutil.Process(command.pid).children(recursive=True)
        with Client(endpoints["grpc"], retries=0) as client:
            if busy:
                steps = client.stream(context, steps=1000, num_latents=512)
                assert next(steps).index == 1
            psutil.Process(endpoints["pid"]).kill()
            began = time.monotonic()
            code = command.wait(WAIT_S)
            took_s = time.monotonic() - began
            if busy:
                with pytest.raises(Hunyuan3DError):
                    list(steps)
        assert code == 128 + signal.SIGKILL and took_s < 5
        assert "tritonserver was killed by signal 9 (out of memory?)" in command.stderr.read()
    _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert alive == []


@pytest.mark.served
def test_a_server_does_not_outlive_a_killed_parent(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after kill -9 of the command, or a time limit that ends a test run."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with serve(repository) as command:
        assert command.stdout is not None and command.stderr is not None
        assert ready(json.loads(command.stdout.readline())["http"])
        family = psutil.Process(command.pid).children(recursive=True)
        command.kill()
    _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    while list((tmp_path / "temporary").glob("hunyuan3d-triton-*")):
        time.sleep(0.1)


def test_what_ignores_the_first_signal_is_killed(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    program = f"""
import subprocess, sys
from pathlib import Path
from hunyuan3d_export.server.orphans import ended_with_this_process
deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"], start_new_session=True)
with ended_with_this_process(deaf.pid, Path({str(tmp_path / "runtime")!r}), grace_s=1):
    print(deaf.pid, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = lines - {"deaf"}
        process = psutil.Process(int(pid))
        family = [process, *process.children(recursive=True)]
        parent.kill()
        _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert [left for left in alive if left.status() != psutil.STATUS_ZOMBIE] == []
    while (tmp_path / "runtime").exists():
        time.sleep(0.1)
