"""What a client needs of a server: the Transport protocol, and a mock of it for your tests. See grpc_transport.py for the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt

from . import contract

Tensors = Mapping[str, npt.NDArray[Any]]


class StatusError(Exception):
    """A transport's only error: a gRPC status (None where the server gave a message alone) and the server's words.

    `server` is the one that failed, where the transport stands for several.
    """

    def __init__(self, status: grpc.StatusCode | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.server: Transport | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """One inference. `streamed`: of a decoupled model, which answers many times. `output_bytes`: sizes known beforehand."""

    model: str
    inputs: Tensors
    request_id: str
    streamed: bool = False
    output_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InputInfo:
    """One input as the server declares it; -1 is a free axis, the batch axis included."""

    dtype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One model as the server declares it; of a model that is not ready only name, version and ready are known.

    `restricted`: the server tells it to holders of its key alone. Inputs are the contract's then, and the rest is not known.
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


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether the server is live and ready, its version ("" where it tells that to holders of its key alone), and its models."""

    live: bool
    ready: bool
    version: str
    models: tuple[ModelInfo, ...]


class Transport(Protocol):
    """What a client needs of a server. Each method raises StatusError and nothing else."""

    def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        """The answers of one request (one, unless streamed). Closing the generator cancels the request."""

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        """Whether the model is; of "", whether the server is live."""

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo: ...

    async def health(self, *, timeout_s: float) -> Health: ...

    async def close(self) -> None: ...


def by_contract(spec: contract.ModelSpec) -> ModelInfo:
    """One model as the contract has it, in Triton's shapes: the batch axis comes first, so that [B] travels as [B, 1]."""
    free = {axis: -1 for axis in (*contract.AXES, "S", "V", "P")}
    shapes = {i.name: (-1, 1) if i.dims == ("B",) else i.shape(free) for i in spec.inputs}
    return ModelInfo(spec.name, "1", inputs={i.name: InputInfo(i.dtype, shapes[i.name], i.optional) for i in spec.inputs})


class MockTransport:
    """A server for your tests: `answer(request)` returns the answers of a request, or raises StatusError.

    Without `answer` the velocity and the condition of a picture are zero, and a sample returns zeros after three steps. `requests` lists what was
    sent, `cancelled` the ids of the requests closed before their last answer was taken.
    """

    def __init__(
        self,
        answer: Callable[[Request], Iterable[Tensors]] | None = None,
        *,
        models: Sequence[ModelInfo] | None = None,
    ) -> None:
        self._answer = answer or _zeros
        specs = (*contract.MODELS.values(), *contract.IMAGE_MODELS.values())
        known = [by_contract(spec) for spec in specs] if models is None else models
        self.models: dict[str, ModelInfo] = {model.name: model for model in known}
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
        return Health(True, all(model.ready for model in models), "mock", models)

    async def close(self) -> None:
        pass


def _zeros(request: Request) -> Iterable[Tensors]:
    inputs = request.inputs
    if request.model == contract.IMAGE_CONTEXT:
        tokens = contract.AXES["T"].opt * len(inputs["image"])
        return [{"context": np.zeros((1, tokens, contract.CONTEXT_WIDTH), np.float16)}]
    if not request.streamed:
        return [{"velocity": np.zeros_like(inputs["latents"])}]
    length = int(inputs["num_latents"][0]) if "num_latents" in inputs else 512
    noise = inputs.get("latents", np.zeros((len(inputs["context"]), length, contract.LATENT_CHANNELS), np.float32))
    total = int(inputs["steps"][0]) if "steps" in inputs else 3
    every = int(inputs["preview_every"][0])
    return [
        {
            "step": np.array([step], np.int32),
            "total": np.array([total], np.int32),
            "t": np.array([step / total], np.float32),
            "batch": np.array([len(noise)], np.int32),
            "path": np.array([b"plain"], np.object_),
            **({"latents": np.zeros_like(noise)} if step == total or (every and step % every == 0) else {}),
        }
        for step in range(1, total + 1)
    ]
