"""Clients that ask for previews and read nothing must not fill the server's memory."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from hunyuan3d_client import contract
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints

pytestmark = [pytest.mark.served, pytest.mark.slow]

READERS, LATENTS, STEPS = 20, 512, 100  # 262 MB of previews, more than this small server has
PREVIEW_MIB, MOST_GROWTH = 32, 1.2
WAIT_S = 400.0


@pytest.fixture
def served(artifacts: Callable[..., Path], tmp_path: Path) -> Iterator[Endpoints]:
    """A server whose bound stands to its own size as the deployed bound stands to a server of v2-0."""
    deploy(artifacts(), tmp_path / "repository")
    path = tmp_path / "repository" / contract.SAMPLER / "configs" / "cpu.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.parameters["preview_mib"].string_value = str(PREVIEW_MIB)
    path.write_text(text_format.MessageToString(config))
    with EmbeddedServer(tmp_path / "repository") as endpoints:
        yield endpoints


def resident_mib(endpoints: Endpoints) -> float:
    """The memory of the server and of its models' processes; what they share is counted once."""
    server = psutil.Process(endpoints.pid)
    return sum(process.memory_full_info().pss for process in [server, *server.children(recursive=True)]) / 2**20


def metric(endpoints: Endpoints, pattern: str) -> int:
    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=30) as answer:
        found = re.search(rf"^{pattern} (\S+)$", answer.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else 0


def request(*, preview_every: int) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name=contract.SAMPLER)
    made.inputs.add(name="context", datatype="FP16", shape=[1, 3, contract.CONTEXT_WIDTH])
    made.raw_input_contents.append(np.ones((1, 3, contract.CONTEXT_WIDTH), np.float16).tobytes())
    for name, value in {"num_latents": LATENTS, "steps": STEPS, "preview_every": preview_every}.items():
        made.inputs.add(name=name, datatype="INT32", shape=[1])
        made.raw_input_contents.append(np.array([value], np.int32).tobytes())
    return made


def run(endpoints: Endpoints, *, preview_every: int, reads: bool) -> float:
    """READERS requests at the same time, until the sampler has ended them all. Returns the memory at that time."""
    done = 'hunyuan3d_requests_total\\{[^}]*outcome="done"[^}]*\\}'
    wanted = metric(endpoints, done) + READERS
    options = [("grpc.max_receive_message_length", -1)]
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(endpoints.grpc, options)) for _ in range(READERS)]
        calls = [
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request(preview_every=preview_every)]))
            for channel in channels
        ]
        deadline = time.monotonic() + WAIT_S
        if reads:
            assert all(len(list(call)) == STEPS for call in calls)
        while metric(endpoints, done) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        found = resident_mib(endpoints)
        for call in calls:
            call.cancel()
    return found


def test_twenty_stalled_readers_with_previews(served: Endpoints) -> None:
    before = run(served, preview_every=0, reads=True)
    stalled = run(served, preview_every=1, reads=False)
    print(f"{before:.0f} MiB -> {stalled:.0f} MiB with {READERS} stalled readers")  # noqa: T201
    assert metric(served, "hunyuan3d_previews_left_out_total(?:\\{[^}]*\\})?") > 0, "the bound must be reached"
    assert stalled < MOST_GROWTH * before, f"{before:.0f} MiB -> {stalled:.0f} MiB"
