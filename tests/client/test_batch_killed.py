"""A batch over two servers, of which one is killed and brought back, and which is itself killed and resumed.

As a program, this file is one of the servers: a KServe v2 server whose meshes hold the checksum of the picture.
"""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from hunyuan3d_client import contract
from hunyuan3d_client.wire import tensors as read

PICTURES = 200
WORK_S = 0.3  # of each request at a server


def checksum(picture: bytes) -> int:
    return zlib.crc32(picture) & 0xFFFFFF  # 24 bits, which a float32 holds


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self) -> None:
        self.samples = 0

    def ServerMetadata(self, request, context):  # noqa: ARG002
        return pb.ServerMetadataResponse(version=str(self.samples))

    def ModelReady(self, request, context):  # noqa: ARG002
        return pb.ModelReadyResponse(ready=True)

    def ModelMetadata(self, request, context):  # noqa: ARG002
        response = pb.ModelMetadataResponse(name=request.name, versions=["1"])
        for spec in contract.MODELS[request.name].inputs:
            response.inputs.add(name=spec.name, datatype=spec.dtype, shape=[-1 if isinstance(d, str) else d for d in spec.dims])
        return response

    def ModelConfig(self, request, context):  # noqa: ARG002
        response = pb.ModelConfigResponse()
        for spec in contract.MODELS[request.name].inputs:
            response.config.input.add(name=spec.name, optional=spec.optional)
        return response

    def ModelInfer(self, request, context):  # noqa: ARG002
        time.sleep(WORK_S)
        picture = request.raw_input_contents[0][4:]
        found = np.zeros((1, 1, contract.CONTEXT_WIDTH), np.float16)
        found[0, 0, :3] = list(checksum(picture).to_bytes(3, "big"))
        response = pb.ModelInferResponse(id=request.id)
        response.outputs.add(name="context", datatype="FP16", shape=found.shape)
        response.raw_output_contents.append(found.tobytes())
        return response

    def ModelStreamInfer(self, requests, context):  # noqa: ARG002
        for request in requests:
            time.sleep(WORK_S)
            given = dict(zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True))
            answer = decoded(given) if request.model_name == contract.MESH else sampled(given)
            response = pb.ModelInferResponse(id=request.id)
            for name, value in answer.items():
                array = value if isinstance(value, np.ndarray) else np.array([value], np.object_)
                response.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
                raw = array.tobytes() if array.dtype != np.object_ else len(value).to_bytes(4, "little") + value
                response.raw_output_contents.append(raw)
            read(response, None)  # as the client will
            self.samples += request.model_name == contract.SAMPLER
            yield pb.ModelStreamInferResponse(infer_response=response)


def sampled(given: dict[str, bytes]) -> dict[str, np.ndarray | bytes]:
    """Latents that are the number in the context."""
    context = np.frombuffer(given["context"], np.float16)
    value = int.from_bytes(bytes(int(each) for each in context[:3]), "big")
    counts = {name: np.ones(1, np.int32) for name in ("step", "total", "batch")}
    return {**counts, "path": b"plain", "t": np.ones(1, np.float32), "latents": np.full((1, 4, 64), value, np.float32)}


def decoded(given: dict[str, bytes]) -> dict[str, np.ndarray | bytes]:
    """A file that says the number in the latents, which is long enough to be written in parts."""
    value = int(np.frombuffer(given["latents"], np.float32)[0])
    return {"mesh": np.frombuffer(contents(value), np.uint8), "mesh_format": b"glb", "statistics": b"{}"}


def contents(value: int) -> bytes:
    return b"%08d" % value * 20_000


def serve(port: int) -> None:
    sys.stdin.readline()  # everything is imported
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    assert server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.wait_for_termination()


def prepared(port: int) -> subprocess.Popen[str]:
    """A server that has not opened its port yet."""
    return subprocess.Popen([sys.executable, __file__, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def servers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (first, second)]
    running = {port: start(prepared(port)) for port in ports}
    yield running
    for process in running.values():
        stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def samples(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return int(stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=10).version)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def results(out: Path) -> list[dict[str, Any]]:
    """The whole lines of the ledger."""
    path = out / "ledger.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith(b"}")]


def check(out: Path, expected: dict[str, int]) -> int:
    """Every visible file is whole and right. Returns their number."""
    found = {path.stem: path.read_bytes() for path in out.glob("*.glb")}
    for name, data in found.items():
        assert data == contents(expected[name]), name
    return len(found)


@pytest.mark.slow
def test_two_hundred_pictures(servers: dict[int, subprocess.Popen[str]], tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    expected = {}
    for index in range(PICTURES):
        (folder / f"{index:03d}.png").write_bytes(b"picture %d" % index)
        expected[f"{index:03d}"] = checksum(b"picture %d" % index)
    first, second = servers
    command = [sys.executable, "-m", "hunyuan3d_client", "batch", str(folder), "--out", str(out), "--json"]
    command += ["--url", f"127.0.0.1:{first},127.0.0.1:{second}"]

    again = prepared(first)
    with subprocess.Popen(command) as batch:
        until(lambda: len(results(out)) >= 40, "the batch must begin")
        stop(servers[first])
        alone = samples(second)
        until(lambda: len(results(out)) >= 80, "the other server must go on")
        assert samples(second) > alone
        servers[first] = start(again)
        until(lambda: samples(first) > 10, "the server that came back must be used")
        until(lambda: len(results(out)) >= 120, "both must go on")
        batch.send_signal(signal.SIGKILL)
        batch.wait()
    before, written = len(results(out)), check(out, expected)
    assert 120 <= before < PICTURES and before <= written
    assert all(line["error"] is None for line in results(out)), "nothing failed for good"

    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["total"], facts["skipped"], facts["done"], facts["failed"]) == (PICTURES, before, PICTURES - before, 0)
    assert check(out, expected) == PICTURES and not list(out.glob(".*"))
    assert sorted(line["name"] for line in results(out)) == sorted(expected), "each result once"
    tries = sum(line["attempts"] - 1 for line in results(out))
    sys.stdout.write(
        f"{before} results before the SIGKILL ({written} files), {facts['done']} after it in {time.monotonic() - started:.1f} s; "
        f"{tries} repeated requests; the server that came back made {samples(first)} samples\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_batch_resumes(
    number: signal.Signals, code: int, servers: dict[int, subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for index in range(60):
        (tmp_path / "pictures" / f"{index}.png").write_bytes(b"picture %d" % index)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hunyuan3d_client", "batch", str(tmp_path / "pictures"), "--out", str(out), "--json"]
    command += ["--url", f"127.0.0.1:{next(iter(servers))}"]
    with subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as batch:
        until(lambda: len(results(out)) >= 10, "the batch must begin")
        batch.send_signal(number)
        assert batch.wait(30) == code
    before = len(results(out))
    assert before == len(list(out.glob("*.glb"))) < 60 and not list(out.glob(".*"))
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert (facts["skipped"], facts["done"]) == (before, 60 - before)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
