"""AsyncClient: arguments in, arrays out. requests.py and pictures.py make the tensors, exchange.py sends them.

Axes: B batch, L latent tokens, T context tokens. Arrays may be NumPy's, torch's, cupy's or nested lists; context and
latents without the batch axis mean B = 1. `t`, `guidance` and a denoiser's `guidance_scale` are one number or B numbers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import contract, requests
from .errors import InvalidInput, ModelFailed, ModelNotReady, invalid
from .exchange import Exchange, left_s, one
from .grpc_transport import GrpcTransport, SharedMemory
from .mesh import Mesh, MeshProgress
from .offload import in_thread, is_small
from .options import DecodeOptions, GenerateOptions, GenerateStreamOptions, SampleOptions, StreamOptions, takes
from .pictures import checked_views, image_inputs
from .requests import Scalars, Step
from .round_robin import RoundRobin
from .streams import AsyncStream
from .transport import Health, ModelInfo, Request, Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack  # for type checkers alone: the package does not need it installed

T = TypeVar("T")
Inputs = dict[str, npt.NDArray[Any]]
Latents = npt.NDArray[np.float32]
Context = npt.NDArray[np.float16]
_LONGEST_S = 86_400.0
_DEFAULT_URL = "localhost:8001"


class AsyncClient:
    """A client for asyncio. It sends at most `max_in_flight` requests at a time; further requests wait within their timeout.

    `url` is the host:port of a server, a list of several servers with the same models (calls take turns, see RoundRobin), or
    dns:///name:port for all addresses of a name. Without it the client calls localhost:8001. `transport` replaces `url` and
    `shared_memory`: a GrpcTransport with TLS or headers, a RoundRobin, a MockTransport. `shared_memory`: see GrpcTransport.
    `timeout_s` is the default of every call. A request that was refused, or that never reached the server, is sent again up
    to `retries` times, with exponential backoff and jitter, within a budget that all calls share. A request that was
    answered in part is never sent again.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        transport: Transport | None = None,
        timeout_s: float = 300.0,
        max_in_flight: int = 64,
        retries: int = 2,
        shared_memory: SharedMemory = "auto",
    ) -> None:
        if max_in_flight < 1 or retries < 0:
            raise invalid("max_in_flight and retries", "at least 1 and 0", (max_in_flight, retries), "leave them out")
        if transport is not None and (url is not None or shared_memory != "auto"):
            raise invalid(
                "url and shared_memory", "left out beside transport", (url, shared_memory), "give them to the transport"
            )
        self._transport: Transport = transport or _connected(_DEFAULT_URL if url is None else url, shared_memory)
        self._exchange = Exchange(self._transport, max_in_flight=max_in_flight, retries=retries)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel. Calls in flight raise Cancelled."""
        await self._exchange.close()

    async def denoise(
        self,
        latents: Any,
        t: Scalars,
        context: Any,
        *,
        guidance: Scalars | None = None,
        guidance_scale: Scalars | None = None,
        timeout_s: float | None = None,
    ) -> Latents:
        """The velocity [B, L, 64] float32 at latents [B, L, 64] float32, t in [0, 1] and context [B, T, 1536] float16.

        `guidance` is for guidance-distilled weights; `guidance_scale` asks for the guided model. Wider floats are cast.
        A batch larger than the server's limit is split, its parts are sent side by side and their results joined. The result
        may be read-only: a batch that was not split is returned as a view of the received message, without a copy.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        deadline = self._deadline(timeout_s)
        scales = {"guidance": guidance, "guidance_scale": guidance_scale}
        made = functools.partial(requests.denoise, latents, t, context, **scales)
        name, inputs = made() if is_small(latents, context) else await in_thread(made, timeout_s=left_s(deadline))
        model, inputs = await self._conform(name, inputs, deadline)
        most = min(model.max_batch_size or contract.AXES["B"].max, contract.AXES["B"].max)
        starts = range(0, len(inputs["latents"]), most)
        parts = [{key: array[start : start + most] for key, array in inputs.items()} for start in starts]
        tasks = [asyncio.ensure_future(self._velocity(name, part, deadline)) for part in parts]
        try:
            velocities = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        return velocities[0] if len(velocities) == 1 else np.concatenate(velocities)

    @takes(SampleOptions)
    async def sample(self, context: Any, **options: Unpack[SampleOptions]) -> Latents:
        """The latents [B, L, 64] float32 at the end of a trajectory under the condition tokens context [B, T, 1536].

        An option that is None is left to the deployed preset. `seed` may also be a list of B seeds, one for each sample.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        return await _last(self.stream(context, **options, preview_every=0))

    @takes(StreamOptions)
    def stream(self, context: Any, **options: Unpack[StreamOptions]) -> AsyncStream[Step]:
        """The Steps of a trajectory as the server makes them. Arguments are those of sample(), and `preview_every`.

        Close the stream, or use it in a with block, to cancel the trajectory on the server when you leave early.
        Raises InvalidInput at once (while iterating, for the values of a large array), and what sample() raises while iterating.
        """
        deadline = self._deadline(options.pop("timeout_s"))
        inputs = requests.checked_sample(context, options)
        if is_small(context, options["latents"], options["negative_context"]):
            return AsyncStream(self._trajectory(requests.cast(inputs), deadline))
        return AsyncStream(self._after_cast(self._trajectory, inputs, deadline))

    async def condition(self, image: Any, *, timeout_s: float | None = None) -> Context:
        """The condition tokens [1, T, 1536] float16 of a picture, as sample() and stream() take them.

        A picture is a path, the bytes of a PNG, JPEG or WebP file, a PIL image or a uint8 array [H, W, 3 or 4]. For
        multi-view weights, a list of up to four pictures stands for the views front, left, back, right.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        deadline = self._deadline(timeout_s)
        return await self._encoded(await self._pictured(checked_views(image), deadline), deadline)

    @takes(DecodeOptions)
    async def decode(self, latents: Any, **options: Unpack[DecodeOptions]) -> Mesh:
        """The Mesh of one shape's latents [1, L, 64], as sample() returns them.

        An option that is None is left to the server's config: see docs/mesh.md.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        return await _mesh(self.decode_stream(latents, **options))

    @takes(DecodeOptions)
    def decode_stream(self, latents: Any, **options: Unpack[DecodeOptions]) -> AsyncStream[MeshProgress | Mesh]:
        """The MeshProgress of a decode while the server works, then its Mesh.

        Close the stream, or use it in a with block, to cancel the decode on the server when you leave early.
        Raises InvalidInput at once (while iterating, for the values of a large array), and what decode() raises while iterating.
        """
        deadline = self._deadline(options.pop("timeout_s"))
        inputs = requests.checked_decode(latents, options)
        if is_small(latents):
            return AsyncStream(self._decoded(requests.cast(inputs), deadline))
        return AsyncStream(self._after_cast(self._decoded, inputs, deadline))

    @takes(GenerateOptions)
    async def generate(self, image: Any, **options: Unpack[GenerateOptions]) -> Mesh:
        """The Mesh of a picture, with its latents: condition(), then sample(), then decode() with these options.

        For the latents alone: sample(condition(image)).
        Raises what condition(), sample() and decode() raise.
        """
        return await _mesh(self.generate_stream(image, **options, preview_every=0))

    @takes(GenerateStreamOptions)
    def generate_stream(self, image: Any, **options: Unpack[GenerateStreamOptions]) -> AsyncStream[Step | MeshProgress | Mesh]:
        """The Steps of generate()'s trajectory as the server makes them, then the MeshProgress of its decode, then the Mesh.

        Close the stream, or use it in a with block, to cancel the work on the server when you leave early.
        Raises InvalidInput at once (while iterating, for an unreadable file), and what generate() raises while iterating.
        """
        deadline = self._deadline(options.pop("timeout_s"))
        requests.check_meshing(options)
        sampling = requests.checked_options(options)
        return AsyncStream(self._from_image(checked_views(image), sampling, options, deadline))

    async def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether the server is live and ready, its version and its models. Raises ServerUnavailable, DeadlineExceeded."""
        deadline = self._deadline(timeout_s)
        return await self._exchange.ask(lambda left_s: self._transport.health(timeout_s=left_s), model="", deadline=deadline)

    async def model_info(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """What the server says of one model: inputs, batch limit, parameters. Raises ModelNotReady, ServerUnavailable."""
        return await self._exchange.model(name, deadline=self._deadline(timeout_s), fresh=True)

    async def _conform(self, name: str, inputs: Inputs, deadline: float) -> tuple[ModelInfo, Inputs]:
        """The model's declaration, and the inputs in the form that it asks for.

        A remembered declaration may be out of date, so no input is refused before the server has been asked again.
        """
        try:
            model = await self._exchange.model(name, deadline=deadline)
            return model, requests.conform(inputs, model)
        except (InvalidInput, ModelNotReady):
            model = await self._exchange.model(name, deadline=deadline, fresh=True)
            return model, requests.conform(inputs, model)

    async def _velocity(self, model: str, inputs: Inputs, deadline: float) -> Latents:
        request = Request(model, inputs, uuid.uuid4().hex, output_bytes={"velocity": inputs["latents"].nbytes})
        parse = functools.partial(requests.velocity, like=inputs["latents"])
        return await one(self._exchange.infer(request, parse, deadline=deadline))

    async def _pictured(self, views: list[Any], deadline: float) -> Inputs:
        """The image encoder's inputs for the views. Their number is checked against the server's encoder."""
        inputs = await in_thread(functools.partial(image_inputs, views), timeout_s=left_s(deadline))
        return (await self._conform(contract.IMAGE_CONTEXT, inputs, deadline))[1]

    async def _encoded(self, inputs: Inputs, deadline: float) -> Context:
        request = Request(contract.IMAGE_CONTEXT, inputs, uuid.uuid4().hex)
        return await one(self._exchange.infer(request, requests.context, deadline=deadline))

    async def _trajectory(self, inputs: Inputs, deadline: float) -> AsyncGenerator[Step, None]:
        _, inputs = await self._conform(contract.SAMPLER, inputs, deadline)
        request = Request(contract.SAMPLER, inputs, uuid.uuid4().hex, streamed=True, outputs=requests.STEP_OUTPUTS)
        last = None
        async with aclosing(self._exchange.infer(request, requests.step, deadline=deadline)) as steps:
            async for last in steps:
                yield last
        if last is None or last.index != last.total or last.latents is None:
            message = f"a trajectory must end with its last step's latents, got {last}\nhint: {ModelFailed.hint}"
            raise ModelFailed(message, request_id=request.request_id, model=request.model, attempt=1)

    async def _decoded(self, inputs: Inputs, deadline: float) -> AsyncGenerator[MeshProgress | Mesh, None]:
        _, inputs = await self._conform(contract.MESH, inputs, deadline)
        request = Request(contract.MESH, inputs, uuid.uuid4().hex, streamed=True)
        last = None
        async with aclosing(self._exchange.infer(request, requests.mesh, deadline=deadline)) as answers:
            async for last in answers:
                yield last
        if not isinstance(last, Mesh):
            message = f"a decode must end with a mesh, got {last}\nhint: {ModelFailed.hint}"
            raise ModelFailed(message, request_id=request.request_id, model=request.model, attempt=1)

    async def _after_cast(
        self, answers: Callable[[Inputs, float], AsyncGenerator[T, None]], inputs: Inputs, deadline: float
    ) -> AsyncGenerator[T, None]:
        """The answers to inputs that are too large to be cast on the event loop."""
        inputs = await in_thread(functools.partial(requests.cast, inputs), timeout_s=left_s(deadline))
        async with aclosing(answers(inputs, deadline)) as opened:
            async for answer in opened:
                yield answer

    async def _from_image(
        self, views: list[Any], sampling: Inputs, options: Mapping[str, Any], deadline: float
    ) -> AsyncGenerator[Step | MeshProgress | Mesh, None]:
        """The condition of a picture, the sampler's stream, then that of the mesh model: three requests, although the server has
        an ensemble for all.

        Triton (24.10, among others) does not pass the cancelling of an ensemble's request on to its models, and an ensemble
        cannot stream both the steps and the progress of the mesh.
        """
        pictured = await self._pictured(views, deadline)
        await self._conform(contract.SAMPLER, sampling, deadline)  # before the picture is sent
        await self._require_meshes(deadline)
        context = await self._encoded(pictured, deadline)
        latents = None
        async with aclosing(self._trajectory({**sampling, "context": context}, deadline)) as steps:
            async for step in steps:
                latents = step.latents
                yield step
        async with aclosing(self._decoded(requests.decode(latents, options), deadline)) as answers:
            async for answer in answers:
                yield dataclasses.replace(answer, latents=latents) if isinstance(answer, Mesh) else answer

    async def _require_meshes(self, deadline: float) -> None:
        """Raises ModelNotReady where the server makes no meshes, before minutes of sampling."""
        try:
            await self._exchange.model(contract.MESH, deadline=deadline)
        except ModelNotReady as error:
            raise ModelNotReady(
                f"{contract.MESH} must be ready on the server for generate(), got no such model\n"
                "hint: for latents, call condition() and then sample(); for meshes, deploy a shape decoder: hunyuan3d-export vae",
                status=error.status,
                model=contract.MESH,
            ) from error

    def _deadline(self, timeout_s: float | None) -> float:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if not (isinstance(limit_s, (int, float)) and 0 < limit_s <= _LONGEST_S):
            raise invalid(
                "timeout_s", f"seconds, above 0 and at most {_LONGEST_S}", repr(limit_s), "leave it out for the client's"
            )
        return time.monotonic() + limit_s


async def _last(trajectory: AsyncStream[Step]) -> Latents:
    """The latents at the end of a trajectory."""
    latents = None
    async with trajectory:
        async for step in trajectory:
            latents = step.latents
    assert latents is not None  # AsyncClient._trajectory raises ModelFailed otherwise
    return latents


async def _mesh(answers: AsyncStream[Any]) -> Mesh:
    """The Mesh at the end of a decode."""
    last = None
    async with answers:
        async for answer in answers:
            last = answer
    assert isinstance(last, Mesh)  # AsyncClient._decoded raises ModelFailed otherwise
    return last


def _connected(url: str | Sequence[str], shared_memory: SharedMemory) -> Transport:
    if isinstance(url, str):
        return GrpcTransport(url, shared_memory=shared_memory)
    return RoundRobin([GrpcTransport(each, shared_memory=shared_memory) for each in url])
