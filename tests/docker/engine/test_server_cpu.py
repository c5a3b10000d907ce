"""server-cpu in a real container: built, healthy, hardened, repaired after a crash, drained on stop, gone after `down`."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import trimesh

from hunyuan3d_client import Client, Hunyuan3DError

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

CONTEXT = np.ones((1, 3, 1536), np.float16)
REPAIRED_S = 60.0
STATUS = "import pathlib; print(pathlib.Path('/proc/1/status').read_text())"
# Ends the first process whose command line has the argument in it. PID 1, the entrypoint, is not meant.
KILL = """
import os, pathlib, signal, sys
for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    words = path.read_bytes().split(b'\\0')
    if path.parent.name != '1' and sys.argv[1].encode() in words[0] and sys.argv[2].encode() in b' '.join(words):
        os.kill(int(path.parent.name), signal.SIGKILL)
        print(path.parent.name)
        break
"""


@pytest.fixture(scope="module")
def server(project: Any, record_testsuite_property: Any) -> Any:
    begin = time.monotonic()
    project.compose("build", "server-cpu")
    built = time.monotonic()
    project.compose("up", "--detach", "--wait", "server-cpu")
    record_testsuite_property("build_s", round(built - begin, 1))
    record_testsuite_property("up_s", round(time.monotonic() - built, 1))
    print(f"built in {built - begin:.1f} s, healthy {time.monotonic() - built:.1f} s after up")  # noqa: T201
    return project


def client(server: Any, **options: Any) -> Client:
    return Client(f"127.0.0.1:{server.ports['grpc']}", timeout_s=1200, **options)


def test_a_sample_and_a_mesh_through_the_published_port(server: Any) -> None:
    with client(server) as calls:
        latents = calls.sample(CONTEXT, num_latents=16, steps=5, seed=1)
        mesh = calls.decode(latents, resolution=16, format="ply")
    assert latents.shape == (1, 16, 64) and np.isfinite(latents).all()
    assert isinstance(trimesh.load(trimesh.util.wrap_as_stream(mesh.data), file_type="ply"), trimesh.Trimesh)


def test_the_process_can_do_nothing_but_serve(server: Any) -> None:
    told = dict(line.split(":", 1) for line in server.inside(STATUS).splitlines())
    assert set(told["Uid"].split()) == set(told["Gid"].split()) == {"1000"}
    assert {int(told[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert told["NoNewPrivs"].strip() == "1" and told["Seccomp"].strip() == "2"
    host = server.engine.inspect(server.container())["HostConfig"]
    assert host["ReadonlyRootfs"] and not host["Privileged"] and host["CapDrop"] == ["ALL"]
    assert [bind.rsplit(":", 1)[1] for bind in host["Binds"]] == ["ro"] * len(host["Binds"])
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'x').write_text('x')"
    server.inside(write, "/tmp")
    for folder in ("/", "/opt/hunyuan3d", "/models", "/etc", "/usr"):
        refused = server.engine.docker(
            "exec", server.container(), "python", "-c", f"{write}; print('written')", folder, check=False
        )
        assert "written" not in refused, folder


def test_no_limit_is_asked_for_that_a_host_may_refuse(server: Any) -> None:
    assert not server.engine.inspect(server.container())["HostConfig"]["Ulimits"]


def test_each_line_of_the_log_is_json(server: Any) -> None:
    lines = server.engine.docker("logs", server.container()).splitlines()
    records = [json.loads(line) for line in lines]
    assert any("Started GRPCInferenceService" in record["message"] for record in records)
    assert len(records) > 20 and all({"time", "level", "source", "message"} <= set(record) for record in records)


@pytest.mark.parametrize(
    ("program", "of"),
    [
        ("tritonserver", ""),
        ("triton_python_backend_stub", "hunyuan3d_sampler/"),
        ("triton_python_backend_stub", "hunyuan3d_dit_guided/"),
    ],
    ids=["server", "sampler", "denoiser"],
)
def test_what_is_killed_is_repaired_within_a_minute(program: str, of: str, server: Any) -> None:
    """Docker restarts the container: at once after the server's end, and after the guard has ended a server without its model."""
    server.wait_healthy(within_s=REPAIRED_S)
    before = server.engine.inspect(server.container())["RestartCount"]
    begin = time.monotonic()
    assert server.inside(KILL, program, of), "the process must exist"
    while server.engine.inspect(server.container())["RestartCount"] == before:
        assert time.monotonic() - begin < REPAIRED_S, server.compose("logs", "--tail", "30", "server-cpu")
        time.sleep(0.2)
    server.wait_healthy(within_s=REPAIRED_S)
    with client(server, retries=0) as calls:
        calls.sample(CONTEXT, num_latents=16, steps=2)
    took = time.monotonic() - begin
    print(f"{program} {of}: served again after {took:.1f} s")  # noqa: T201
    assert took < REPAIRED_S


def test_stop_lets_a_running_sample_end(server: Any) -> None:
    server.wait_healthy(within_s=REPAIRED_S)
    refused: list[Exception] = []
    with client(server, retries=0) as calls:
        steps = calls.stream(CONTEXT, num_latents=512, steps=1000)
        first = next(steps)
        stopping = threading.Thread(target=server.compose, args=("stop", "server-cpu"))
        stopping.start()
        while not refused:
            try:
                calls.sample(CONTEXT, num_latents=4, steps=1)
                time.sleep(0.2)
            except Hunyuan3DError as error:
                refused.append(error)
        *_, last = steps
        stopping.join()
    state = server.engine.inspect(server.container())["State"]
    assert first.index < last.index == 1000 and last.latents is not None
    assert state["ExitCode"] == 0 and not state["Running"]


def test_down_leaves_nothing(server: Any) -> None:
    server.compose("up", "--detach", "--wait", "server-cpu")
    server.compose("down", "--volumes")
    left = [server.engine.docker(kind, "ls", *more, "--quiet") for kind, *more in (("container", "--all"), ("volume",))]
    assert left == ["", ""]
    assert "hunyuan3d" not in server.engine.docker("network", "ls")
