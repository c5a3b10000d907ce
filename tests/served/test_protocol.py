"""docs/protocol.md: its commands, run as they are printed against a real server, where their programs exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from hunyuan3d_client import Client
from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served


def blocks(root: Path) -> list[str]:
    found = re.findall(r"^```bash\n(.*?)^```", (root / "docs" / "protocol.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == 2, "each block needs a test that runs it"
    return found


def run(line: str, served: Endpoints, folder: Path) -> subprocess.CompletedProcess[str]:
    text = line.replace("localhost:8001", served.grpc).replace("localhost:8000", served.http)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_the_messages_can_be_taken_from_tritonclient(root: Path, served: Endpoints, tmp_path: Path) -> None:
    describe, *calls = blocks(root)[0].splitlines()
    run(describe, served, tmp_path)
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "triton.protoset").read_bytes()).file:
        pool.Add(file)
    service = pool.FindServiceByName("inference.GRPCInferenceService")
    assert {"ModelReady", "ModelInfer", "ModelStreamInfer"} <= set(service.methods_by_name)
    assert [call.split()[0] for call in calls] == ["grpcurl", "buf"]
    here = [call for call in calls if shutil.which(call.split()[0])]
    for call in here:
        assert json.loads(run(call, served, tmp_path).stdout) == {"ready": True}
    if not here:
        pytest.skip("neither grpcurl nor buf is on this machine; the messages that they need are right")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_the_request_over_http(root: Path, served: Endpoints, tmp_path: Path, client: Client) -> None:
    for line in blocks(root)[1].splitlines():
        run(line, served, tmp_path)
    found = np.frombuffer((tmp_path / "latents.bin").read_bytes(), np.float32).reshape(1, 64, 64)
    context = np.fromfile(tmp_path / "context.bin", "<f2").reshape(1, 16, 1536)
    np.testing.assert_allclose(found, client.sample(context, steps=10, num_latents=64), rtol=1e-4, atol=1e-4)
    length = re.search(r"(?i)^inference-header-content-length: (\d+)", (tmp_path / "answer.headers").read_text(), re.MULTILINE)
    assert length is not None
    answer = (tmp_path / "answer.bin").read_bytes()
    assert json.loads(answer[: int(length[1])])["id"] == "mine-7" and answer[int(length[1]) :] == found.tobytes()
