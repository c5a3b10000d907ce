"""How a request reaches a server: the Transport protocol, gRPC, and a mock for tests. Only this file imports tritonclient."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from . import contract

Tensors = Mapping[str, npt.NDArray[Any]]


class StatusError(Exception):
    """A transport's only error: a gRPC status (None where the server gave a message alone) and the server's words."""

    def __init__(self, status: grpc.StatusCode | None, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Request:
    """One inference. `streamed`: of a decoupled model, which answers many times."""

    model: str
    inputs: Tensors
    request_id: str
    streamed: bool = False


@dataclasses.dataclass(frozen=True)
class InputInfo:
    """One input as the server declares it; -1 is a free axis, the batch axis included."""

    dtype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One model as the server declares it; of a model that is not ready only name, version and ready are known."""

    name: str
    version: str = ""
    ready: bool = True
    platform: str = ""
    file: str = ""
    max_batch_size: int = 0
    inputs: Mapping[str, InputInfo] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether the server is live and ready, its version, and its models."""

    live: bool
    ready: bool
    version: str
    models: tuple[ModelInfo, ...]


class Transport(Protocol):
    """What a client needs of a server. Each method raises StatusError and nothing else."""

    def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        """The answers of one request (one, unless streamed). Closing the generator cancels the request."""

    async def model_ready(self, name: str, *, timeout_s: float) -> bool: ...

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo: ...

    async def health(self, *, timeout_s: float) -> Health: ...

    async def close(self) -> None: ...


# Triton answers a ping that comes sooner than 300 s after the last with GOAWAY, so keep-alive is slower than that.
CHANNEL_OPTIONS: Mapping[str, int] = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 310_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2_000,
}
# Without this header the errors of a stream carry no status (Triton >= 24.08).
STREAM_HEADERS: Mapping[str, str] = {"triton_grpc_error": "true"}


class GrpcTransport:
    """One gRPC channel to Triton, opened by the first call in the event loop of that call.

    `credentials` of grpc.ssl_channel_credentials() turn TLS (or mTLS) on; `headers` go with every call (a bearer
    token); `options` add to or replace CHANNEL_OPTIONS.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        headers: Mapping[str, str] | None = None,
        options: Mapping[str, str | int] | None = None,
    ) -> None:
        self._url = url
        self._credentials = credentials
        self._headers = dict(headers or {})
        self._options = list({**CHANNEL_OPTIONS, **(options or {})}.items())
        self._opened: triton.InferenceServerClient | None = None

    @property
    def _client(self) -> triton.InferenceServerClient:
        if self._opened is None:
            self._opened = triton.InferenceServerClient(self._url, creds=self._credentials, channel_args=self._options)
        return self._opened

    async def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        fields = {
            "model_name": request.model,
            "inputs": [_input(name, array) for name, array in request.inputs.items()],
            "request_id": request.request_id,
            "timeout": max(1, int(timeout_s * 1e6)),  # microseconds; enforced by the model, also where cancelling cannot reach
        }
        if not request.streamed:
            yield _tensors(await self._call("infer", **fields, timeout_s=timeout_s))
            return
        headers = {**self._headers, **STREAM_HEADERS}
        try:
            answers = self._client.stream_infer(_once(fields), stream_timeout=timeout_s, headers=headers)
        except grpc.aio.UsageError as closed:
            raise StatusError(grpc.StatusCode.CANCELLED, str(closed)) from None
        try:
            async for result, error in answers:
                if error is not None:
                    raise StatusError(None, error.message())
                yield _tensors(result)
        except grpc.RpcError as error:
            raise StatusError(error.code(), error.details()) from None
        finally:
            answers.cancel()

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        return bool(await self._call("is_model_ready", name, timeout_s=timeout_s))

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo:
        metadata = await self._call("get_model_metadata", name, timeout_s=timeout_s)
        config = (await self._call("get_model_config", name, timeout_s=timeout_s)).config
        optional = {tensor.name for tensor in config.input if tensor.optional}
        return ModelInfo(
            name=name,
            version=",".join(metadata.versions),
            platform=config.platform or config.backend,
            file=config.default_model_filename,
            max_batch_size=config.max_batch_size,
            inputs={i.name: InputInfo(i.datatype, tuple(i.shape), i.name in optional) for i in metadata.inputs},
            parameters={key: value.string_value for key, value in sorted(config.parameters.items())},
        )

    async def health(self, *, timeout_s: float) -> Health:
        live = await self._call("is_server_live", timeout_s=timeout_s)
        ready = await self._call("is_server_ready", timeout_s=timeout_s)
        server = await self._call("get_server_metadata", timeout_s=timeout_s)
        models = []
        for entry in (await self._call("get_model_repository_index", timeout_s=timeout_s)).models:
            if entry.state == "READY":
                models.append(await self.model_info(entry.name, timeout_s=timeout_s))
            else:
                models.append(ModelInfo(entry.name, entry.version, ready=False))
        return Health(live, ready, server.version, tuple(models))

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def _call(self, method: str, /, *args: str, timeout_s: float, **fields: object) -> Any:
        try:
            call = getattr(self._client, method)
            return await call(*args, **fields, headers=self._headers, client_timeout=timeout_s)
        except InferenceServerException as error:
            status = error.status()  # "StatusCode.NAME"
            raise StatusError(grpc.StatusCode[status.rpartition(".")[2]] if status else None, error.message()) from None
        except grpc.aio.UsageError as closed:
            raise StatusError(grpc.StatusCode.CANCELLED, str(closed)) from None


async def _once(fields: dict[str, object]) -> AsyncIterator[dict[str, object]]:
    yield fields


def _input(name: str, array: npt.NDArray[Any]) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array)


def _tensors(result: triton.InferResult) -> Tensors:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def _declared(spec: contract.ModelSpec) -> ModelInfo:
    free = {axis: -1 for axis in (*contract.AXES, "S")}
    return ModelInfo(spec.name, "1", inputs={i.name: InputInfo(i.dtype, i.shape(free), i.optional) for i in spec.inputs})


class MockTransport:
    """A server for your tests: `answer(request)` returns the answers of a request, or raises StatusError.

    Without `answer` the velocity is zero, and a sample returns zeros after three steps. `requests` lists what was
    sent, `cancelled` the ids of the requests closed before their last answer was taken.
    """

    def __init__(
        self,
        answer: Callable[[Request], Iterable[Tensors]] | None = None,
        *,
        models: Sequence[ModelInfo] | None = None,
    ) -> None:
        self._answer = answer or _zeros
        known = [_declared(spec) for spec in contract.MODELS.values()] if models is None else models
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
        return name in self.models and self.models[name].ready

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
            "path": np.array([b"plain"], np.object_),
            **({"latents": np.zeros_like(noise)} if step == total or (every and step % every == 0) else {}),
        }
        for step in range(1, total + 1)
    ]
