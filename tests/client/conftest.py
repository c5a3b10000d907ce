"""Servers for the client's tests: transports that stall or fail, and a KServe v2 gRPC server in this process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import mmap
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from hunyuan3d_client import MockTransport, Request, StatusError, contract, shared_memory
from hunyuan3d_client.transport import Tensors

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def place(parameters: Any) -> tuple[str, int, int] | None:
    """The segment, first byte and end of a tensor in shared memory; None for a tensor in the message itself."""
    if "shared_memory_region" not in parameters:
        return None
    start = parameters["shared_memory_offset"].int64_param
    return parameters["shared_memory_region"].string_param, start, start + parameters["shared_memory_byte_size"].int64_param


def read(request: pb.ModelInferRequest, name: str, segments: Mapping[str, mmap.mmap] = MappingProxyType({})) -> np.ndarray:
    contents = iter(request.raw_input_contents)  # a tensor in shared memory has no content here
    for tensor in request.inputs:
        placed = place(tensor.parameters)
        content = segments[placed[0]][placed[1] : placed[2]] if placed else next(contents)
        if tensor.name == name:
            return np.frombuffer(content, contract.NUMPY_DTYPES[tensor.datatype]).reshape(tensor.shape)
    raise KeyError(name)


def respond(
    request: pb.ModelInferRequest, tensors: dict[str, np.ndarray], segments: Mapping[str, mmap.mmap] = MappingProxyType({})
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    placed = {output.name: place(output.parameters) for output in request.outputs}
    for name, array in tensors.items():
        datatype = next(key for key, dtype in contract.NUMPY_DTYPES.items() if np.dtype(dtype) == array.dtype)
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if datatype == "BYTES":
            content = b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())
        else:
            content = array.tobytes()
        if placed.get(name):
            segment, start, end = placed[name]
            segments[segment][start:end] = content
            content = b""
        response.raw_output_contents.append(content)
    return response


class Kserve(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers velocity = t * latents, and trajectories of `steps` steps whose latents hold the seed.

    `fail` is a status to abort with. A stream answers `text` as an error without a status, and `told`, a code and a message,
    as an error output like the sampler's.
    """

    def __init__(self) -> None:
        self.requests: list[pb.ModelInferRequest] = []
        self.headers: list[dict[str, str]] = []
        self.ready = True
        self.fail: grpc.StatusCode | None = None
        self.text = ""
        self.words = "told to fail"
        self.trailers: tuple[tuple[str, str], ...] = ()  # sent with `fail`
        self.questions: list[dict[str, str]] = []  # the headers of calls about the server and its models
        self.told: tuple[str, str] | None = None
        self.stall = threading.Event()  # answers wait until it is set
        self.stall.set()
        self.cancelled = threading.Event()
        self.hold_after = 0  # a trajectory stops after this step until the client cancels
        self.infos = 0
        self.answer: pb.ModelInferResponse | None = None  # replaces the right answer
        self.segments: dict[str, mmap.mmap] = {}
        self.registrations = 0
        self.refusal: grpc.StatusCode | None = None  # the status that refuses to register a segment
        self.asked_to_register = 0
        self.missing = ""  # the name of a model that is not ready
        self.served: str | None = None  # what the sampler says about the weights
        self.restricted = False  # metadata needs the header "key: secret"
        self.pause_s = 0.0  # before each answer about the server and its models
        self.silent: set[str] = set()  # the calls that get no answer while `stall` is clear

    def _begin(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.headers.append(dict(context.invocation_metadata()))
        context.add_callback(self.cancelled.set)
        self.stall.wait(20)
        if self.fail is not None:
            context.set_trailing_metadata(self.trailers)
            context.abort(self.fail, self.words)

    def _wait(self, name: str) -> None:
        if name in self.silent:
            self.stall.wait(20)

    def _guard(self, context: grpc.ServicerContext) -> None:
        time.sleep(self.pause_s)
        self.questions.append(dict(context.invocation_metadata()))
        if self.restricted and ("key", "secret") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAVAILABLE, "words that must not matter")

    def ServerLive(self, request, context):  # noqa: ARG002
        self._wait("ServerLive")
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):  # noqa: ARG002
        self._wait("ServerReady")
        return pb.ServerReadyResponse(ready=self.ready)

    def ServerMetadata(self, request, context):  # noqa: ARG002
        self._guard(context)
        return pb.ServerMetadataResponse(name="triton", version="9.9")

    def ModelReady(self, request, context):  # noqa: ARG002
        self._wait("ModelReady")
        return pb.ModelReadyResponse(ready=self.ready and request.name != self.missing)

    def RepositoryIndex(self, request, context):  # noqa: ARG002
        self._guard(context)
        entry = pb.RepositoryIndexResponse.ModelIndex
        state = "READY" if self.ready else "UNAVAILABLE"
        return pb.RepositoryIndexResponse(models=[entry(name=name, version="1", state=state) for name in contract.MODELS])

    def ModelMetadata(self, request, context):
        self._guard(context)
        self.infos += 1
        if request.name not in contract.MODELS:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown model")
        response = pb.ModelMetadataResponse(name=request.name, versions=["1"])
        for spec in contract.MODELS[request.name].inputs:
            shape = [-1 if isinstance(dim, str) else dim for dim in spec.dims]
            response.inputs.add(name=spec.name, datatype=spec.dtype, shape=shape if spec.dims != ("B",) else [-1, 1])
        return response

    def ModelConfig(self, request, context):
        self._guard(context)
        response = pb.ModelConfigResponse()
        response.config.backend = "python"
        response.config.max_batch_size = 8 if request.name in (contract.DIT, contract.DIT_GUIDED) else 0
        response.config.parameters["precision"].string_value = "fp32"
        for spec in contract.MODELS[request.name].inputs:
            response.config.input.add(name=spec.name, optional=spec.optional)
        return response

    def SystemSharedMemoryRegister(self, request, context):
        self.asked_to_register += 1
        self._wait("SystemSharedMemoryRegister")
        if self.refusal is not None:
            context.abort(self.refusal, "unable to open the segment")
        with Path(f"/dev/shm{request.key}").open("r+b") as file:
            self.segments[request.name] = mmap.mmap(file.fileno(), request.byte_size)
        self.registrations += 1
        return pb.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request, context):  # noqa: ARG002
        self._wait("SystemSharedMemoryUnregister")
        self.segments.pop(request.name).close()
        return pb.SystemSharedMemoryUnregisterResponse()

    def SystemSharedMemoryStatus(self, request, context):  # noqa: ARG002
        self._wait("SystemSharedMemoryStatus")
        response = pb.SystemSharedMemoryStatusResponse()
        for name in self.segments:
            response.regions[name].name = name
        return response

    def ModelInfer(self, request, context):
        self._begin(request, context)
        wanted = [placed[0] for tensor in (*request.inputs, *request.outputs) if (placed := place(tensor.parameters))]
        if not self.segments.keys() >= set(wanted):
            context.abort(grpc.StatusCode.NOT_FOUND, "unable to find the segment")
        if self.answer is not None:
            return self.answer
        velocity = read(request, "latents", self.segments) * read(request, "t", self.segments).reshape(-1, 1, 1)
        return respond(request, {"velocity": velocity}, self.segments)

    def ModelStreamInfer(self, requests, context):
        for request in requests:
            if [output.name for output in request.outputs] == [contract.SERVED.name]:
                if self.served is None:  # as a sampler of an older version
                    yield pb.ModelStreamInferResponse(error_message="unexpected inference output 'served'")
                else:
                    told = {contract.SERVED.name: np.array([self.served.encode()], np.object_)}
                    yield pb.ModelStreamInferResponse(infer_response=respond(request, told))
                continue
            self._begin(request, context)
            if self.text:
                yield pb.ModelStreamInferResponse(error_message=self.text)
                continue
            if self.told is not None and request.parameters[contract.ERRORS_AS_OUTPUTS].bool_param:
                told = {contract.ERROR.name: np.array([part.encode() for part in self.told], np.object_)}
                yield pb.ModelStreamInferResponse(infer_response=respond(request, told))
                if self.hold_after:
                    self.cancelled.wait(20)
                continue
            total = int(read(request, "steps", self.segments)[0])
            drawn = [read(request, "seed", self.segments)[0] for tensor in request.inputs if tensor.name == "seed"] or [0]
            for step in range(1, total + 1):
                tensors = {
                    "step": np.array([step], np.int32),
                    "total": np.array([total], np.int32),
                    "t": np.array([step / total], np.float32),
                    "batch": np.array([4], np.int32),
                    "path": np.array([b"plain"], np.object_),
                }
                if step == total:
                    tensors["latents"] = np.full((len(read(request, "context", self.segments)), 3, 64), drawn[0], np.float32)
                yield pb.ModelStreamInferResponse(infer_response=respond(request, tensors))
                if step == self.hold_after:
                    self.cancelled.wait(20)
                    return


@pytest.fixture
def kserve() -> Iterator[Kserve]:
    """A server with its address in `.url`."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, options=UNLIMITED)
        service = Kserve()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        service.url = f"localhost:{server.add_insecure_port('localhost:0')}"
        service.stop = server.stop
        server.start()
        yield service
        service.stall.set()
        server.stop(0).wait()


@pytest.fixture
def tokens() -> Callable[..., np.ndarray]:
    """context(B, T) of small random float16."""

    def make(batch: int = 1, length: int = 5) -> np.ndarray:
        return np.random.default_rng(7).standard_normal((batch, length, contract.CONTEXT_WIDTH)).astype(np.float16)

    return make


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The prefix of the segments of this test alone. No such segment may remain."""
    prefix = f"hunyuan3d-test-{os.getpid()}-"
    monkeypatch.setattr(shared_memory, "_PREFIX", prefix)
    yield prefix
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


class Stalled(MockTransport):
    """Takes requests and answers none until `go`."""

    def __init__(self) -> None:
        super().__init__(doubled)
        self.started = threading.Semaphore(0)
        self.left = threading.Semaphore(0)
        self.go = asyncio.Event()

    async def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        self.started.release()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            self.left.release()
            raise
        async for answer in super().infer(request, timeout_s=timeout_s):
            yield answer


class Failing(MockTransport):
    """Fails with each status in turn, then answers."""

    def __init__(self, *statuses: grpc.StatusCode | None) -> None:
        super().__init__(self._fail)
        self._statuses = list(statuses)

    def _fail(self, request: Request) -> Iterable[Tensors]:
        if self._statuses:
            raise StatusError(self._statuses.pop(0), "words that must not matter: UNAVAILABLE INVALID_ARGUMENT")
        return doubled(request)


def doubled(request: Request) -> list[Tensors]:
    return [{"velocity": request.inputs["latents"] * 2}]


@pytest.fixture
def stalled() -> Stalled:
    return Stalled()


@pytest.fixture
def failing() -> type[Failing]:
    return Failing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hunyuan3d_client.exchange._FIRST_PAUSE_S", 1e-3)
