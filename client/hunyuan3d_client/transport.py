"""What a client needs of a server: the Transport protocol, and a mock server for your tests. grpc_transport.py is the real one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt

from . import contract
from .identity import ServedWeights

Tensors = Mapping[str, npt.NDArray[Any]]
_RETRY = re.compile(r"^hint: try again in (\d+(?:\.\d+)?) s$", re.MULTILINE)  # the sampler's words


class StatusError(Exception):
    """The only error of a transport: a gRPC status (None where the server sent a message without a status) and a text.

    `server` is the transport of the server that failed, where the transport that raises stands for several servers.
    `retry_after_s` is what the server, in its text, or a proxy before it says of when to try again.
    """

    def __init__(self, status: grpc.StatusCode | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.server: Transport | None = None
        told = _RETRY.search(message)
        self.retry_after_s: float | None = float(told[1]) if told else None

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle. The server is a connection of this process."""
        return StatusError, (self.status, str(self)), {"retry_after_s": self.retry_after_s}


@dataclasses.dataclass(frozen=True)
class Request:
    """One inference request.

    `streamed`: the model is decoupled and may answer many times. `output_bytes`: the sizes of outputs that are known before
    the answer arrives, so that shared memory can be reserved for them. `outputs`: the only outputs that the server should send;
    without it the server sends all. `headers`: of this request alone, or a function that returns them.
    """

    model: str
    inputs: Tensors
    request_id: str
    streamed: bool = False
    output_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    headers: Any = None


@dataclasses.dataclass(frozen=True)
class InputInfo:
    """One input as the server declares it. -1 stands for a free axis, the batch axis included."""

    dtype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One model as the server declares it. Of a model that is not ready, only name, version and ready are known.

    `restricted`: the server describes the model only to callers who send its key, and this client sent none. The inputs are
    then those of the contract, and the other fields are empty. `trouble`: why a model that the server was asked for is not ready, in
    the server's words; empty for one that it was never asked for. `weights`: those behind the model, which health() alone fills in.
    """

    name: str
    version: str = ""
    ready: bool = True
    platform: str = ""
    file: str = ""
    max_batch_size: int = 0
    inputs: Mapping[str, InputInfo] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    restricted: bool = False
    trouble: str = ""
    weights: ServedWeights | None = None


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether the server is live and ready, its version and its models.

    The version is empty where the server gives it only to callers who send its key. `weights`: model -> the weights that it
    serves; empty where the server has no sampler, which tells them, or where its sampler is older than this client.
    """

    live: bool
    ready: bool
    version: str
    models: tuple[ModelInfo, ...]
    weights: Mapping[str, ServedWeights] = dataclasses.field(default_factory=dict)

    @property
    def preset(self) -> str:
        """The preset of the served denoiser; empty where it is not known."""
        return next((self.weights[name].preset for name in contract.DENOISERS if name in self.weights), "")


class Transport(Protocol):
    """What a client needs of a server. Each method raises StatusError and nothing else."""

    def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        """The answers to a request: one, or several if it is streamed. Closing the generator cancels the request."""

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        """Whether the model called `name` is ready. For the empty name: whether the server is live."""

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo: ...

    async def health(self, *, timeout_s: float) -> Health: ...

    async def close(self) -> None: ...


def by_contract(spec: contract.ModelSpec) -> ModelInfo:
    """A model as the contract describes it, in the shapes that Triton declares."""
    inputs = {tensor.name: InputInfo(tensor.dtype, _declared(tensor), tensor.optional) for tensor in spec.inputs}
    return ModelInfo(spec.name, "1", inputs=inputs)


def _declared(tensor: contract.TensorSpec) -> tuple[int, ...]:
    if tensor.dims == ("B",):
        return -1, 1  # Triton requires an axis beside the batch axis, so a number for each sample travels as [B, 1]
    return tuple(-1 if isinstance(dim, str) else dim for dim in tensor.dims)


class MockTransport:
    """A server for your tests. `answer(request)` returns the answers to a request, or raises StatusError.

    Without `answer`, every model of the contract answers with zeros in the shapes of its outputs, and a sample takes three
    steps unless the request says otherwise; the mesh models give a file of zeros. `requests` lists what was sent, `timeouts_s` the
    time that each request was given, and `cancelled` the ids of the requests that were closed before their last answer was
    taken. `weights`: those that health() reports.
    """

    def __init__(
        self,
        answer: Callable[[Request], Iterable[Tensors]] | None = None,
        *,
        models: Sequence[ModelInfo] | None = None,
        weights: Mapping[str, ServedWeights] | None = None,
    ) -> None:
        self._answer = answer or _zeros
        known = [by_contract(spec) for spec in contract.MODELS.values()] if models is None else models
        self.models: dict[str, ModelInfo] = {model.name: model for model in known}
        self.weights: dict[str, ServedWeights] = dict(weights or {})
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.timeouts_s: list[float] = []

    async def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        self.requests.append(request)
        self.timeouts_s.append(timeout_s)
        try:
            for tensors in self._answer(request):
                yield tensors
        except GeneratorExit:
            self.cancelled.append(request.request_id)
            raise

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:  # noqa: ARG002
        return not name or (name in self.models and self.models[name].ready)

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo:
        if not await self.model_ready(name, timeout_s=timeout_s):
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"{name} is not ready")
        return self.models[name]

    async def health(self, *, timeout_s: float) -> Health:  # noqa: ARG002
        models = tuple(self.models.values())
        return Health(True, all(model.ready for model in models), "mock", models, self.weights)

    async def close(self) -> None:
        pass


_MOCK_STEPS = 3
_MOCK_LATENTS = 512


def _zeros(request: Request) -> Iterable[Tensors]:
    """MockTransport's answer where a test gives none: zeros in the shapes of the outputs of the request's model."""
    if request.model not in contract.MODELS:
        raise StatusError(
            grpc.StatusCode.NOT_FOUND, f"{request.model} is not in the contract\nhint: give MockTransport an answer"
        )
    spec = contract.MODELS[request.model]
    sizes = _sizes(spec, request.inputs)
    shapes = {tensor.name: np.zeros(tensor.shape(sizes), tensor.numpy_dtype) for tensor in spec.outputs}
    if "mesh" in shapes:
        answers = _zero_mesh(request.inputs, shapes)
        return answers if request.streamed else answers[-1:]
    if "step" not in shapes:
        return [{tensor.name: shapes[tensor.name] for tensor in spec.outputs if not tensor.optional}]
    steps = _zero_steps(request.inputs, shapes["latents"])
    return steps if request.streamed else steps[-1:]  # a model of one response gives the last step alone


def _sizes(spec: contract.ModelSpec, inputs: Tensors) -> dict[str, int]:
    """The size of each free axis: that of the request's inputs, or else its usual size, or else 1."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        if tensor.name in inputs:
            named = zip(tensor.dims, inputs[tensor.name].shape, strict=False)  # [B] travels as [B, 1]
            sizes |= {dim: size for dim, size in named if isinstance(dim, str)}
    length = int(inputs["num_latents"][0]) if "num_latents" in inputs else _MOCK_LATENTS
    tokens = contract.AXES["T"].opt * sizes.get("V", 1)  # each view of an object brings its own tokens
    free = {dim: 1 for tensor in spec.outputs for dim in tensor.dims if isinstance(dim, str)}
    usual = {axis: span.opt for axis, span in contract.AXES.items()}
    return {**free, **usual, "B": 1, "L": length, "T": tokens, **sizes}


def _zero_steps(inputs: Tensors, latents: npt.NDArray[Any]) -> list[Tensors]:
    """The responses of a sampler: every step, with `latents` in the previews that the request asks for and in the last."""
    total = int(inputs["steps"][0]) if "steps" in inputs else _MOCK_STEPS
    every = int(inputs["preview_every"][0]) if "preview_every" in inputs else 0
    samples = len(latents)
    last = {"network_evaluations": np.full(samples, total, np.int32), "forecast_error": np.zeros(samples, np.float32)}
    return [
        {
            "step": np.array([step], np.int32),
            "total": np.array([total], np.int32),
            "t": np.array([step / total], np.float32),
            "batch": np.array([len(latents)], np.int32),
            "path": np.array([contract.PATHS[0].encode()], np.object_),
            "evaluated": np.array([len(latents)], np.int32),
            **({"latents": latents} if step == total or (every and step % every == 0) else {}),
            **(last if step == total else {}),
        }
        for step in range(1, total + 1)
    ]


def _zero_mesh(inputs: Tensors, shapes: Tensors) -> list[Tensors]:
    """The responses of a mesh model: the progress of one wave, then a file of zeros in the format that the request asks for."""
    progress = {name: array for name, array in shapes.items() if name in ("refinement", "refinements", "evaluations")}
    stages = [{**progress, "stage": np.array([stage], np.object_)} for stage in (b"field", b"done")]
    result = {
        "mesh": shapes["mesh"],
        "mesh_format": inputs.get("format", np.array([contract.MESH_FORMATS[0].encode()], np.object_)),
        "statistics": np.array([b'{"vertices": 0, "faces": 0, "watertight": false}'], np.object_),
    }
    final = {name: array for name, array in {**stages[-1], **result}.items() if name in shapes}
    return [stages[0], final] if progress else [final]
