"""Runs a real tritonserver on this machine's CPU, from the wheel nvidia-pytriton (extra `embedded`).

The wheel carries the server, its Python backend and stubs; wheel.py lays them out as the server expects.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ..engines.plan_check import DeployError, check_plan
from ..engines.targets import PLAN_FILES
from ..manifest import Manifest
from .loadable import VERSION, loadable, memory_pool_flags
from .orphans import ended_with_this_process
from .wheel import ServerStartError, lay_out

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 45.0
_LOG_END_S = 5.0
_KEPT_LOG_LINES = 30
_KEPT_ERRORS = 20
_ERROR_LINE = re.compile(r"E\d{4} |error:")  # error lines of glog, and the last message of the server itself
_HARMLESS = "CudaDriverHelper has not been initialized"  # on every machine without a GPU
# Triton says one failure several times: where it happened, that the model failed to load, and that the server cannot start.
_FAILED_LOAD = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?:[A-Z][\w ]+: )?(?P<why>.*)")
_PREFIX = re.compile(r"E\d{4} \S+ +\d+ \S+\] |error: ")
_HOST = "127.0.0.1"

TORCH_CONFIG = "torch"

__all__ = ["TORCH_CONFIG", "EmbeddedServer", "Endpoints", "ServerOptions", "ServerStartError", "loadable_models", "raw_log"]

logger = logging.getLogger(__name__)
raw_log = logging.getLogger(f"{__name__}.raw")  # the server's own lines; those of errors after the start have the level ERROR


@dataclasses.dataclass(frozen=True)
class Endpoints:
    """The addresses of a running server, each as host:port, and its process id."""

    grpc: str
    http: str
    metrics: str
    pid: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """config: the name of a file in each model's configs/ folder. Port 0 takes a free port. extra: further server flags, whose
    paths must be absolute, because the server works in a folder of its own."""

    config: str = "cpu"
    grpc_port: int = 0
    http_port: int = 0
    metrics_port: int = 0
    ready_timeout_s: float = READY_TIMEOUT_S
    extra: Sequence[str] = ()


class EmbeddedServer:
    """One tritonserver process on 127.0.0.1. Use it as a context manager, or call start() and stop(). It ends with this process.

    start() raises ServerStartError when the platform is not supported, the wheel is missing, a port is taken, or the server is
    not ready in time or dies; the error then says the cause.
    """

    def __init__(self, repository: Path, options: ServerOptions | None = None) -> None:
        self.repository = Path(repository)
        self.options = options or ServerOptions()
        self.endpoints: Endpoints | None = None
        self._process: subprocess.Popen[str] | None = None
        self._log: collections.deque[str] = collections.deque(maxlen=_KEPT_LOG_LINES)
        # Errors have a list of their own: a server may crash long after a load failed, and its last lines then hide the reason.
        self._errors: list[str] = []
        self._ready = False
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Endpoints:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Endpoints:
        """Starts the server and returns once all of its models are ready."""
        models = loadable_models(self.repository, self.options.config)
        ports = _ports(self.options)
        try:
            runtime = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="hunyuan3d-triton-")))
            launcher = lay_out(runtime)
            command = _command(launcher, self.repository.absolute(), models, ports, self.options)
            self._process = subprocess.Popen(
                command,
                cwd=_python_path(runtime / "packages"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a process group of its own, so that its models' processes can be ended with it
            )
            self._resources.callback(self._process.stdout.close if self._process.stdout else bool)
            self._resources.enter_context(ended_with_this_process(self._process.pid, runtime))
            self._reader = threading.Thread(target=self._follow_log, daemon=True)
            self._reader.start()
            grpc, http, metrics = (f"{_HOST}:{port}" for port in ports)
            self.endpoints = Endpoints(grpc, http, metrics, self._process.pid)
            self._wait_ready()
            self._ready = True
        except BaseException:
            self.stop()
            raise
        return self.endpoints

    def stop(self) -> None:
        """Sends SIGTERM, then SIGKILL when work in flight has not ended in time. A second call is safe."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.warning("tritonserver did not end within %.0f s and was killed", STOP_TIMEOUT_S)
                process.kill()
                process.wait()
        if process is not None:
            self._end_models(process)
        self._resources.close()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits until the server ends by itself, and ends its models' processes.

        Returns its exit code (see `ended`), or None when it has not ended within timeout_s; None waits for ever.
        """
        assert self._process is not None, "start() first"
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._end_models(self._process)
        return code

    def _end_models(self, process: subprocess.Popen[str]) -> None:
        """Kills what a server that has ended left of its process group.

        The process of a Python model outlives a server that was killed. It holds the log's pipe, so that the reader of the log
        would wait for ever, and closing the pipe would wait for the reader.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._reader.join(_LOG_END_S)

    def _follow_log(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._log.append(line.rstrip())
            wrong = bool(_ERROR_LINE.match(line)) and _HARMLESS not in line
            if wrong and len(self._errors) < _KEPT_ERRORS:
                self._errors.append(line.rstrip())
            raw_log.log(logging.ERROR if wrong and self._ready else logging.INFO, "tritonserver: %s", line.rstrip())

    def _wait_ready(self) -> None:
        assert self._process is not None and self.endpoints is not None
        deadline = time.monotonic() + self.options.ready_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._end_models(self._process)
                raise ServerStartError(f"tritonserver must stay up, got {_end(self._process.returncode)}{self._cause()}")
            # Triton opens its metrics port last, after it has reported that it is ready.
            metrics = "--allow-metrics=false" in self.options.extra or _answers(f"{self.endpoints.metrics}/metrics")
            if metrics and _answers(f"{self.endpoints.http}/v2/health/ready"):
                return
            time.sleep(0.1)
        raise ServerStartError(f"tritonserver must be ready within {self.options.ready_timeout_s:.0f} s{self._cause()}")

    def _cause(self) -> str:
        """The end of a failure's message: its cause, said once, or the last lines of the log where no line is an error's."""
        hint = "hint: its whole log: hunyuan3d-export serve --log"
        loads = [found for line in self._errors if (found := _FAILED_LOAD.search(line))]
        texts = [f"{loads[0]['model']} failed to load: {loads[0]['why']}"] if loads else self._errors[:1]
        if not texts:
            return "\n".join(["\nlast log lines:", *(f"  {line}" for line in self._log), hint])
        said, _, where = _PREFIX.sub("", texts[0]).replace("\\n", "\n").replace('\\"', '"').partition("\n\nAt:")
        place = next(iter(where.strip().splitlines()), "")
        return "\n".join([f": {said.strip(chr(34)).strip()}", *([f"  at {place.strip()}"] if place else []), hint])


def ended(code: int) -> str:
    """What happened to a server that ended with this exit code of subprocess, as a sentence."""
    return f"tritonserver {'was killed by' if code < 0 else 'ended with'} {_end(code)}"


def _end(code: int) -> str:
    if code < 0:
        return f"signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    return f"exit code {code}"


def loadable_models(repository: Path, config_name: str) -> list[str]:
    """The names of the models that can be served: the file of their config is deployed, and so are the models that they need.

    Raises DeployError when there is no repository, when it holds only code, or when Triton could not load one of its plans.
    """
    source = "--checkpoint FILE" if config_name == TORCH_CONFIG else "--artifacts DIR"
    hint = f"hint: hunyuan3d-export deploy {source} --repository {repository}"
    found = loadable(repository, config_name)
    if not found.files:
        raise DeployError(f"{repository} must be a model repository, found no config.pbtxt\n{hint}")
    for name, reason in found.missing.items():
        raw_log.info("%s: not served, %s", name, reason)
    if found.missing:
        logger.info("not deployed: %s", ", ".join(found.missing))
    for warning in found.warnings:
        logger.warning("%s", warning)
    served = [folder for folder in found.models if found.files[folder.name]]
    if not served:
        wanted = ", ".join(sorted({Path(file).name for file in found.files.values() if file}))
        raise DeployError(f"{repository} must hold a deployed {wanted} for config {config_name}, found none\n{hint}")
    for folder in served:
        if found.files[folder.name] in PLAN_FILES.values():
            check_plan(Manifest.read(folder / VERSION, hint="deploy it again with: hunyuan3d-export deploy"), folder / VERSION)
    return [folder.name for folder in found.models]


def _command(
    launcher: Path, repository: Path, models: list[str], ports: tuple[int, int, int], options: ServerOptions
) -> list[str]:
    grpc_port, http_port, metrics_port = ports
    return [
        str(launcher),
        f"--model-repository={repository}",
        f"--backend-directory={launcher.parent.parent / 'backends'}",
        f"--model-config-name={options.config}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        *(f"--{name}-address={_HOST}" for name in ("grpc", "http", "metrics")),
        f"--grpc-port={grpc_port}",
        f"--http-port={http_port}",
        f"--metrics-port={metrics_port}",
        "--disable-auto-complete-config",
        *memory_pool_flags(loadable(repository, options.config), options.config),
        *options.extra,
    ]


def _python_path(folder: Path) -> Path:
    """Fills a working folder for the server with links to what PYTHONPATH holds. Returns the folder.

    Triton's stub ignores PYTHONPATH, and looks for packages in its working folder first, whatever folder a user stands in.
    """
    folder.mkdir()
    for path in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        for found in Path(path).absolute().glob("*"):
            link = folder / found.name
            if not link.is_symlink():  # the first folder of PYTHONPATH that has a name wins
                link.symlink_to(found)
    return folder


def _ports(options: ServerOptions) -> tuple[int, int, int]:
    """The ports of grpc, http and metrics. All three are held open while they are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        return (
            _reserve(stack, options.grpc_port, "grpc"),
            _reserve(stack, options.http_port, "http"),
            _reserve(stack, options.metrics_port, "metrics"),
        )


def _reserve(stack: contextlib.ExitStack, port: int, name: str) -> int:
    probe = stack.enter_context(socket.socket())
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((_HOST, port))
    except OSError as error:
        raise ServerStartError(
            f"{name} port must be free, got {port}: {error.strerror}\nhint: pass --{name}-port 0 to take any free port"
        ) from error
    return int(probe.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
