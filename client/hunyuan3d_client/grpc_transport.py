"""A server over gRPC: the channel, its calls, and shared memory where the server is on the same host. wire.py has the messages."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Literal

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from . import contract, identity, wire
from . import headers as headers_
from .addresses import checked, is_same_host
from .deadlines import until
from .errors import invalid
from .home import check_grpc
from .identity import ServedWeights
from .shared_memory import GONE, Pool, Segment
from .transport import Health, InputInfo, ModelInfo, Request, StatusError, Tensors, by_contract

# Triton closes a connection (GOAWAY) that pings again within 300 s, so the keep-alive pings are further apart.
CHANNEL_OPTIONS: Mapping[str, int] = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 310_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2_000,
}
_BALANCED = {"grpc.service_config": json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})}
SharedMemory = bool | Literal["auto"]
_END_S = 1.0  # how long to wait for a stream to end after its last answer
_TELL_S = 5.0  # how long to wait for what the sampler says about the weights
logger = logging.getLogger("hunyuan3d_client")
_SERVICE = "/inference.GRPCInferenceService/"


class GrpcTransport:
    """One gRPC channel to Triton, opened by the first call in the event loop of that call.

    `credentials` of grpc.ssl_channel_credentials() turn TLS (or mTLS) on. `headers` go with every call (a bearer token, for
    example); a function is asked for them before each call. `options` add to or replace CHANNEL_OPTIONS. With a `dns:///name:port` address, calls take turns among the
    addresses of the name. `shared_memory` says whether tensors of half a megabyte and more travel in shared memory: False
    never uses it, "auto" uses it where a server on this host agrees, True insists on it. True is refused for a `dns:`
    address, which may stand for several servers. Raises InvalidInput.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        headers: headers_.Headers | None = None,
        options: Mapping[str, str | int] | None = None,
        shared_memory: SharedMemory = False,
    ) -> None:
        if shared_memory not in (True, False, "auto"):
            raise invalid("shared_memory", "True, False or 'auto'", repr(shared_memory), "leave it out to go without")
        many = checked(url).startswith("dns:")
        if many and shared_memory is True:
            raise invalid("shared_memory", "False or 'auto' for a dns: address", True, "list the servers' own addresses")
        self._url = url
        self._credentials = credentials
        self._headers = headers_.checked(headers) if isinstance(headers, Mapping) else headers
        self._warned = credentials is not None or is_same_host(url)
        self._options = list({**CHANNEL_OPTIONS, **(_BALANCED if many else {}), **(options or {})}.items())
        self._channel: grpc.aio.Channel | None = None
        wanted = shared_memory is True or (shared_memory == "auto" and is_same_host(url))
        self._pool = Pool(self, insist=shared_memory is True) if wanted else None

    def _open(self) -> None:
        check_grpc()
        if self._channel is None:
            channel = (
                grpc.aio.insecure_channel(self._url, self._options)
                if self._credentials is None
                else grpc.aio.secure_channel(self._url, self._credentials, self._options)
            )
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            self._infer = channel.unary_unary(f"{_SERVICE}ModelInfer", None, pb.ModelInferResponse.FromString)
            self._stream = channel.stream_stream(f"{_SERVICE}ModelStreamInfer", None, pb.ModelStreamInferResponse.FromString)
            self._channel = channel

    async def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        """The answers to a request, streamed or not.

        A server that has restarted no longer knows the shared memory of a request. The request is then placed in new memory
        and sent once more.
        """
        left = until(timeout_s)
        for again in (True, False):
            with headers_.of_question(request.headers):
                segment = await self._pool.take(request, timeout_s=left()) if self._pool else None
            landed = False
            try:
                async with aclosing(self._answers(request, segment, left())) as answers:
                    async for answer in answers:
                        yield answer
                landed = True
                return
            except StatusError as failure:
                if not (self._pool and segment) or failure.status in GONE:
                    raise
                with headers_.of_question(request.headers):
                    landed = await self._pool.knows(segment, timeout_s=left())
                if landed or not again:
                    raise
            finally:
                if self._pool and segment:
                    self._pool.give_back(segment, landed=landed)

    async def _answers(self, request: Request, segment: Segment | None, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        self._open()
        left = until(timeout_s)
        metadata = await self._metadata(request.headers, left())
        message = wire.message(request, segment, left())
        with _statuses():
            if not request.streamed:
                yield wire.tensors(await self._infer(message, timeout=left(), metadata=metadata), segment)
                return
            call = self._stream(_once(message), timeout=left(), metadata=metadata)
            try:
                async for response in call:
                    if response.error_message:
                        raise StatusError(None, response.error_message)
                    answer = wire.tensors(response.infer_response, segment)
                    if (refusal := wire.refusal(answer)) is not None:
                        # Wait for the server to close the stream, so that `finally` does not cancel a request that is over.
                        with suppress(asyncio.TimeoutError):
                            await asyncio.wait_for(call.code(), min(_END_S, left()))
                        raise refusal
                    yield answer
            finally:
                call.cancel()

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        if not name:
            return bool((await self._ask("ServerLive", pb.ServerLiveRequest(), timeout_s)).live)
        return bool((await self._ask("ModelReady", pb.ModelReadyRequest(name=name), timeout_s)).ready)

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo:
        """A model as the server declares it, or as the contract does where the server tells only callers who send its key."""
        left = until(timeout_s)
        metadata = await self._if_open("ModelMetadata", pb.ModelMetadataRequest(name=name), left())
        configured = await self._if_open("ModelConfig", pb.ModelConfigRequest(name=name), left())
        if metadata is None or configured is None:
            if await self.model_ready(name, timeout_s=left()):
                return _restricted(name)
            # A server that is ready merely lacks the model. A server that is shutting down is UNAVAILABLE, so that the caller
            # goes to another server.
            ready = (await self._ask("ServerReady", pb.ServerReadyRequest(), left())).ready
            status = grpc.StatusCode.NOT_FOUND if ready else grpc.StatusCode.UNAVAILABLE
            raise StatusError(status, f"{name} is not ready")
        config = configured.config
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
        left = until(timeout_s)
        live = (await self._ask("ServerLive", pb.ServerLiveRequest(), left())).live
        ready = (await self._ask("ServerReady", pb.ServerReadyRequest(), left())).ready
        server = await self._if_open("ServerMetadata", pb.ServerMetadataRequest(), left())
        models = []
        for name, version, loaded, trouble in await self._models(left()):
            info = ModelInfo(name, version, ready=False, trouble=trouble)
            models.append(await self.model_info(name, timeout_s=left()) if loaded else info)
        sampler = any(model.name == contract.SAMPLER and model.ready for model in models)
        weights = await self._weights(min(left(), _TELL_S)) if sampler else {}
        models = [dataclasses.replace(model, weights=weights.get(model.name)) for model in models]
        return Health(live, ready, server.version if server else "", tuple(models), weights)

    async def _weights(self, timeout_s: float) -> dict[str, ServedWeights]:
        """What the sampler says about the weights of each model. Triton refuses this question to a sampler of an older version."""
        context = np.zeros((1, 1, contract.CONTEXT_WIDTH), np.float16)  # Triton takes no request without it
        outputs = (contract.SERVED.name,)
        request = Request(
            contract.SAMPLER,
            {contract.CONTEXT.name: context},
            "weights",
            streamed=True,
            outputs=outputs,
            headers=headers_.current_question(),
        )
        try:
            async with aclosing(self._answers(request, None, timeout_s)) as answers:
                async for answer in answers:
                    return identity.parse(answer[contract.SERVED.name].item().decode())
        except (StatusError, KeyError, ValueError) as failure:
            logger.debug("the sampler does not say what it serves: %s", failure)
        return {}

    async def _models(self, timeout_s: float) -> list[tuple[str, str, bool, str]]:
        """Name, version, readiness and trouble of every model. Where the server restricts its index, the contract's models are asked for."""
        left = until(timeout_s)
        index = await self._if_open("RepositoryIndex", pb.RepositoryIndexRequest(), left())
        if index is None:
            ready = {name: await self.model_ready(name, timeout_s=left()) for name in contract.MODELS}
            return [(name, "", True, "") for name, loaded in ready.items() if loaded]
        # Triton gives no state to a model that is in its folder but that it was never told to load.
        return [(e.name, e.version, e.state == "READY", e.reason or e.state.lower()) for e in index.models]

    async def register(self, name: str, size_bytes: int, *, timeout_s: float) -> None:
        request = pb.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", byte_size=size_bytes)
        await self._ask("SystemSharedMemoryRegister", request, timeout_s)

    async def unregister(self, name: str, *, timeout_s: float) -> None:
        await self._ask("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=name), timeout_s)

    async def registered(self, *, timeout_s: float) -> set[str]:
        return set((await self._ask("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(), timeout_s)).regions)

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        if self._channel is not None:
            await self._channel.close()

    async def _ask(self, method: str, message: object, timeout_s: float) -> Any:
        self._open()
        left = until(timeout_s)
        metadata = await self._metadata(headers_.current_question(), left())
        with _statuses():
            return await getattr(self._stub, method)(message, timeout=left(), metadata=metadata)

    async def _metadata(self, of_call: headers_.Headers | None, timeout_s: float) -> headers_.Pairs:
        """The transport's headers and those of a call, which win. Warns once of secrets that others can read."""
        left = until(timeout_s)
        common = self._headers if isinstance(self._headers, tuple) else await headers_.resolved(self._headers, timeout_s=left())
        pairs = common
        if of_call is not None:
            pairs = tuple({**dict(common), **dict(await headers_.resolved(of_call, timeout_s=left()))}.items())
        if not self._warned and (secrets := headers_.names_secrets(pairs)):
            self._warned = True
            logger.warning(
                "The header %s travels to %s in plaintext, so that others on the way can read it.\n"
                "hint: turn TLS on: GrpcTransport(credentials=grpc.ssl_channel_credentials())",
                secrets[0],
                self._url,
            )
        return pairs

    async def _if_open(self, method: str, message: object, timeout_s: float) -> Any:
        """The answer of _ask, or None if it is UNAVAILABLE: so Triton answers a caller without the key of a restricted protocol."""
        try:
            return await self._ask(method, message, timeout_s)
        except StatusError as failure:
            if failure.status is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None


def _restricted(name: str) -> ModelInfo:
    """A model as the contract describes it. The server alone knows whether its weights are guidance-distilled."""
    info = by_contract(contract.MODELS[name]) if name in contract.MODELS else ModelInfo(name)
    guidance = {contract.GUIDANCE.name: InputInfo(contract.GUIDANCE.dtype, (-1, 1), optional=True)}
    more = guidance if name == contract.DIT else {}
    return dataclasses.replace(info, version="", inputs={**info.inputs, **more}, restricted=True)


@contextmanager
def _statuses() -> Iterator[None]:
    """Raise gRPC's exceptions as StatusError, the only error of a transport."""
    try:
        yield
    except grpc.RpcError as error:
        failure = StatusError(error.code(), error.details())
        failure.retry_after_s = _retry_after_s(error) or failure.retry_after_s
        raise failure from error
    except grpc.aio.UsageError as closed:
        raise StatusError(grpc.StatusCode.CANCELLED, str(closed)) from closed


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """When to try again, as a proxy (retry-after, in seconds) or a gRPC server (its pushback) says; None if nobody does."""
    told = dict(error.trailing_metadata() or ())
    for name, unit_s in {"grpc-retry-pushback-ms": 1e-3, "retry-after": 1.0}.items():
        with suppress(ValueError):  # a date, or a negative number, which means never
            if name in told and (seconds := float(told[name]) * unit_s) > 0 and math.isfinite(seconds):
                return seconds
    return None


async def _once(message: bytes) -> AsyncIterator[bytes]:
    yield message
