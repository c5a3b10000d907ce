"""AsyncClient: arguments in, arrays out. requests.py and pictures.py make the tensors, exchange.py sends them.

Axes: B batch, L latent tokens, T context tokens. Arrays may be NumPy's, torch's, cupy's or nested lists; context and
latents without the batch axis mean B = 1. `t`, `guidance` and a denoiser's `guidance_scale` are one number or B numbers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import shlex
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import contract, requests
from .batch import Batch, Summary
from .calls import Call
from .calls import call as call_
from .cutouts import Cutout
from .dns_transport import transport_to
from .environment import DEFAULT_TIMEOUT_S, DEFAULT_URL, Connection, timeout_s_from_env
from .errors import InvalidInput, ModelFailed, ModelNotReady, invalid
from .exchange import Exchange, left_s, one
from .grpc_transport import SharedMemory
from .headers import Headers
from .mesh import Mesh, MeshProgress
from .offload import in_thread, is_small
from .options import BatchOptions, DecodeOptions, GenerateOptions, GenerateStreamOptions, SampleOptions, StreamOptions, takes
from .pictures import checked_views, image_inputs, removal_inputs
from .requests import Scalars, Step
from .round_robin import RoundRobin
from .streams import AsyncStream, last
from .transport import Health, ModelInfo, Request, Tensors, Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack  # for type checkers alone: the package does not need it installed

T = TypeVar("T")
Inputs = dict[str, npt.NDArray[Any]]
Latents = npt.NDArray[np.float32]
Context = npt.NDArray[np.float16]
PictureFacts = dict[str, list[Any]]


class AsyncClient:
    """A client for asyncio. It sends at most `max_in_flight` requests at a time; further requests wait within their timeout.

    `url` is the host:port of a server, a list of several servers with the same models (calls take turns, see RoundRobin), or
    dns:///name:port for all addresses of a name (see DnsTransport). Without it the client calls localhost:8001. `transport` replaces `url` and
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
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_in_flight: int = 64,
        retries: int = 2,
        shared_memory: SharedMemory = False,
    ) -> None:
        if max_in_flight < 1 or retries < 0:
            raise invalid("max_in_flight and retries", "at least 1 and 0", (max_in_flight, retries), "leave them out")
        if transport is not None and (url is not None or shared_memory is not False):
            raise invalid(
                "url and shared_memory", "left out beside transport", (url, shared_memory), "give them to the transport"
            )
        self.transport: Transport = transport or _connected(DEFAULT_URL if url is None else url, shared_memory)
        self._exchange = Exchange(self.transport, max_in_flight=max_in_flight, retries=retries)
        self._timeout_s = timeout_s
        self._streams: weakref.WeakSet[AsyncStream[Any]] = weakref.WeakSet()

    @classmethod
    def from_env(cls, *, max_in_flight: int = 64, retries: int = 2) -> AsyncClient:
        """A client of the servers that the environment names: HUNYUAN3D_URL, _TLS, _CA, _CERT, _KEY, _HEADER and _TIMEOUT_S.

        The command `hunyuan3d` reads the same variables. Raises InvalidInput, OSError for a file that cannot be read.
        """
        return cls(
            transport=Connection.from_env().transport(),
            timeout_s=timeout_s_from_env(),
            max_in_flight=max_in_flight,
            retries=retries,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel. Calls in flight raise Cancelled, and open streams end."""
        streams = () if self._exchange.is_elsewhere() else tuple(self._streams)  # in a forked child gRPC would crash
        for stream in streams:  # one by one from outside, because asyncio.run() would close all generators at once
            with suppress(RuntimeError):  # another task waits for its next piece and gets Cancelled
                await stream.aclose()
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
        request_id: str | None = None,
        headers: Headers | None = None,
    ) -> Latents:
        """The velocity [B, L, 64] float32 at latents [B, L, 64] float32, t in [0, 1] and context [B, T, 1536] float16.

        `guidance` is for guidance-distilled weights; `guidance_scale` asks for the guided model. Wider floats are cast.
        A batch larger than the server's limit is split, its parts (request ids ID-0, ID-1, ...) are sent side by side and their
        results joined. The result may be read-only: a batch that was not split is returned as a view of the received message, without a copy.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        call = self._call(timeout_s, request_id=request_id, headers=headers)
        scales = {"guidance": guidance, "guidance_scale": guidance_scale}
        made = functools.partial(requests.denoise, latents, t, context, **scales)
        name, inputs = made() if is_small(latents, context) else await in_thread(made, timeout_s=left_s(call.deadline))
        model, inputs = await self._conform(name, inputs, call)
        most = min(model.max_batch_size or contract.AXES["B"].max, contract.AXES["B"].max)
        starts = range(0, len(inputs["latents"]), most)
        parts = [{key: array[start : start + most] for key, array in inputs.items()} for start in starts]
        requests_ = [self._request(name, part, call, index if len(parts) > 1 else None) for index, part in enumerate(parts)]
        tasks = [asyncio.ensure_future(self._velocity(request, call)) for request in requests_]
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
        step = await last(self.stream(context, **options, preview_every=0))
        assert step.latents is not None  # _trajectory raises ModelFailed otherwise
        return step.latents

    @takes(StreamOptions)
    def stream(self, context: Any, **options: Unpack[StreamOptions]) -> AsyncStream[Step]:
        """The Steps of a trajectory as the server makes them. Arguments are those of sample(), and `preview_every`.

        Close the stream, or use it in a with block, to cancel the trajectory on the server when you leave early.
        Raises InvalidInput at once (while iterating, for the values of a large array), and what sample() raises while iterating.
        """
        call = self._call_of(options)
        inputs = requests.checked_sample(context, options)
        if is_small(context, options["latents"], options["negative_context"]):
            return self._opened(self._trajectory(requests.cast(inputs), call))
        return self._opened(self._after_cast(self._trajectory, inputs, call))

    async def condition(
        self,
        image: Any,
        *,
        remove_background: bool | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Headers | None = None,
    ) -> Context:
        """The condition tokens [1, T, 1536] float16 of a picture, as sample() and stream() take them.

        A picture is a path, the bytes of a PNG, JPEG or WebP file, a PIL image or a uint8 array [H, W, 3 or 4]. For
        multi-view weights, a list of up to four pictures stands for the views front, left, back, right. The server cuts the subject
        out of pictures without transparency, unless `remove_background` is False or it has no model for that.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        call = self._call(timeout_s, request_id=request_id, headers=headers)
        views = checked_views(image)
        context, _ = await self._encoded(await self._pictured(views, call, remove_background), call)
        return context

    async def cutout(
        self, image: Any, *, timeout_s: float | None = None, request_id: str | None = None, headers: Headers | None = None
    ) -> Cutout:
        """The Cutout of a picture: what condition() would encode, with transparency around its subject.

        A picture that has transparency already comes back as it is. The picture is of any kind that condition() takes.
        Raises InvalidInput, also where the picture has no subject, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable,
        ModelFailed, Cancelled.
        """
        call = self._call(timeout_s, request_id=request_id, headers=headers)
        views = checked_views(image)
        if len(views) != 1:
            raise invalid("image", "one picture", f"{len(views)} views", "call cutout() for each")
        inputs = await in_thread(functools.partial(image_inputs, views, True), timeout_s=left_s(call.deadline))
        _, inputs = await self._conform(contract.PREPROCESS, inputs, call)
        request = dataclasses.replace(self._request(contract.PREPROCESS, inputs, call), outputs=requests.CUTOUT_OUTPUTS)
        return await one(self._exchange.infer(request, requests.cutout, call=call))

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
        call = self._call_of(options)
        inputs = requests.checked_decode(latents, options)
        if is_small(latents):
            return self._opened(self._decoded(requests.cast(inputs), call))
        return self._opened(self._after_cast(self._decoded, inputs, call))

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
        call = self._call_of(options)
        requests.check_meshing(options)
        removal_inputs(options["remove_background"])  # checks it
        sampling = requests.checked_options(options)
        return self._opened(self._from_image(checked_views(image), sampling, options, call))

    @takes(BatchOptions)
    async def generate_many(self, pictures: Any, *, out: str | Path, **options: Unpack[BatchOptions]) -> Summary:
        """generate() for many pictures, with the mesh of each in a file of the folder `out`; for format="npy", the latents [1, L, 64].

        `pictures`: a folder, a glob, a JSONL file (lines like {"image": "a.png", "seed": 7}) or a list of pictures. The folder
        also gets ledger.jsonl, from which a later run resumes. Failures are recorded; see Summary.failed.
        Raises InvalidInput, OSError, what generate() raises for on_error="raise", and what model_info() raises.
        """
        folder = Path(out)
        if not folder.parent.is_dir():
            raise invalid("out", "in a folder that exists", str(folder), f"mkdir -p {shlex.quote(str(folder.parent))}")
        folder.mkdir(exist_ok=True)
        batch = await asyncio.to_thread(Batch, self, pictures, folder, dict(options))
        return await batch.run()

    async def health(self, *, timeout_s: float | None = None, headers: Headers | None = None) -> Health:
        """Whether the server is live and ready, its version and its models. Raises ServerUnavailable, DeadlineExceeded."""
        call = self._call(timeout_s, headers=headers)
        return await self._exchange.ask(lambda left_s: self.transport.health(timeout_s=left_s), model="", call=call)

    async def model_info(self, name: str, *, timeout_s: float | None = None, headers: Headers | None = None) -> ModelInfo:
        """What the server says of one model: inputs, batch limit, parameters. Raises ModelNotReady, ServerUnavailable."""
        return await self._exchange.model(name, call=self._call(timeout_s, headers=headers), fresh=True)

    async def _conform(self, name: str, inputs: Inputs, call: Call) -> tuple[ModelInfo, Inputs]:
        """The model's declaration, and the inputs in the form that it asks for.

        A remembered declaration may be out of date, so no input is refused before the server has been asked again.
        """
        try:
            model = await self._exchange.model(name, call=call)
            return model, requests.conform(inputs, model)
        except (InvalidInput, ModelNotReady):
            model = await self._exchange.model(name, call=call, fresh=True)
            return model, requests.conform(inputs, model)

    def _request(self, model: str, inputs: Inputs, call: Call, part: int | None = None, *, streamed: bool = False) -> Request:
        name = call.request_id if part is None else f"{call.request_id}-{part}"
        return Request(model, inputs, name, streamed=streamed, headers=call.headers)

    async def _velocity(self, request: Request, call: Call) -> Latents:
        latents = request.inputs["latents"]
        request = dataclasses.replace(request, output_bytes={"velocity": latents.nbytes})
        return await one(self._exchange.infer(request, functools.partial(requests.velocity, like=latents), call=call))

    async def _pictured(self, views: list[Any], call: Call, remove_background: bool | None) -> Inputs:
        """The image encoder's inputs for the views. Their number is checked against the server's encoder."""
        inputs = await in_thread(functools.partial(image_inputs, views, remove_background), timeout_s=left_s(call.deadline))
        return (await self._conform(contract.IMAGE_CONTEXT, inputs, call))[1]

    async def _encoded(self, inputs: Inputs, call: Call) -> tuple[Context, PictureFacts]:
        request = self._request(contract.IMAGE_CONTEXT, inputs, call)

        def parsed(answer: Tensors) -> tuple[Context, PictureFacts]:
            return requests.context(answer), requests.picture_facts(answer)

        return await one(self._exchange.infer(request, parsed, call=call))

    async def _trajectory(self, inputs: Inputs, call: Call) -> AsyncGenerator[Step, None]:
        _, inputs = await self._conform(contract.SAMPLER, inputs, call)
        request = self._request(contract.SAMPLER, inputs, call, streamed=True)
        request = dataclasses.replace(request, outputs=requests.STEP_OUTPUTS)
        parse = functools.partial(requests.step, request_id=request.request_id)
        step = None
        async with aclosing(self._exchange.infer(request, parse, call=call)) as steps:
            async for step in steps:
                yield step
        if step is None or step.index != step.total or step.latents is None:
            message = f"a trajectory must end with its last step's latents, got {step}\nhint: {ModelFailed.hint}"
            raise ModelFailed(message, request_id=request.request_id, model=request.model, attempt=1)

    async def _decoded(self, inputs: Inputs, call: Call) -> AsyncGenerator[MeshProgress | Mesh, None]:
        _, inputs = await self._conform(contract.MESH, inputs, call)
        request = self._request(contract.MESH, inputs, call, streamed=True)
        answer = None
        async with aclosing(self._exchange.infer(request, requests.mesh, call=call)) as answers:
            async for answer in answers:
                yield answer
        if not isinstance(answer, Mesh):
            message = f"a decode must end with a mesh, got {answer}\nhint: {ModelFailed.hint}"
            raise ModelFailed(message, request_id=request.request_id, model=request.model, attempt=1)

    async def _after_cast(
        self, answers: Callable[[Inputs, Call], AsyncGenerator[T, None]], inputs: Inputs, call: Call
    ) -> AsyncGenerator[T, None]:
        """The answers to inputs that are too large to be cast on the event loop."""
        inputs = await in_thread(functools.partial(requests.cast, inputs), timeout_s=left_s(call.deadline))
        async with aclosing(answers(inputs, call)) as opened:
            async for answer in opened:
                yield answer

    def _picture_stream(self, image: Any, options: Mapping[str, Any]) -> AsyncStream[Step]:
        """The Steps of a picture's trajectory, for this package's callers that want latents and no mesh.

        options: those of GenerateStreamOptions; the options of meshes may be missing.
        """
        options = dict(options)
        call = self._call_of(options)
        remove = options.get("remove_background")
        removal_inputs(remove)  # checks it
        return self._opened(self._sampled(checked_views(image), requests.checked_options(options), remove, call))

    async def _sampled(
        self, views: list[Any], sampling: Inputs, remove_background: bool | None, call: Call
    ) -> AsyncGenerator[Step, None]:
        """The condition of a picture, then the sampler's stream."""
        pictured = await self._prepared(views, sampling, remove_background, call)
        context, _ = await self._encoded(pictured, call)
        async with aclosing(self._trajectory({**sampling, "context": context}, call)) as steps:
            async for step in steps:
                yield step

    async def _prepared(
        self, views: list[Any], sampling: Inputs, remove_background: bool | None, call: Call, *, meshes: bool = False
    ) -> Inputs:
        """The image encoder's inputs. What the server lacks is noticed before the picture is sent.

        meshes: whether the server must also make meshes.
        """
        pictured = await self._pictured(views, call, remove_background)
        await self._conform(contract.SAMPLER, sampling, call)
        if meshes:
            await self._require_meshes(call)
        return pictured

    async def _from_image(
        self, views: list[Any], sampling: Inputs, options: Mapping[str, Any], call: Call
    ) -> AsyncGenerator[Step | MeshProgress | Mesh, None]:
        """The condition of a picture, the sampler's stream, then that of the mesh model: three requests, although the server has
        an ensemble for all.

        Triton (24.10, among others) does not pass the cancelling of an ensemble's request on to its models, and an ensemble
        cannot stream both the steps and the progress of the mesh.
        """
        latents = None
        pictured = await self._prepared(views, sampling, options["remove_background"], call, meshes=True)
        context, facts = await self._encoded(pictured, call)
        async with aclosing(self._trajectory({**sampling, "context": context}, call)) as steps:
            async for step in steps:
                latents = step.latents
                yield step
        async with aclosing(self._decoded(requests.decode(latents, options), call)) as answers:
            async for answer in answers:
                yield _with(answer, latents, facts) if isinstance(answer, Mesh) else answer

    async def _require_meshes(self, call: Call) -> None:
        """Raises ModelNotReady where the server makes no meshes, before minutes of sampling."""
        try:
            await self._exchange.model(contract.MESH, call=call)
        except ModelNotReady as error:
            raise ModelNotReady(
                f"{contract.MESH} must be ready on the server for generate(), got no such model\n"
                "hint: for latents, call condition() and then sample(), or hunyuan3d generate --out latents.npy; for meshes, deploy a "
                "shape decoder: hunyuan3d-export vae",
                status=error.status,
                model=contract.MESH,
            ) from error

    def _opened(self, pieces: AsyncGenerator[T, None]) -> AsyncStream[T]:
        stream = AsyncStream(pieces)
        self._streams.add(stream)
        return stream

    def _call(self, timeout_s: float | None, *, request_id: str | None = None, headers: Headers | None = None) -> Call:
        return call_(self._timeout_s if timeout_s is None else timeout_s, request_id=request_id, headers=headers)

    def _call_of(self, options: Any) -> Call:
        """The call that the options of a sampling method describe. They are taken out of `options`."""
        return self._call(options.pop("timeout_s"), request_id=options.pop("request_id"), headers=options.pop("headers"))


async def _mesh(answers: AsyncStream[Any]) -> Mesh:
    """The Mesh at the end of a decode."""
    mesh = await last(answers)
    assert isinstance(mesh, Mesh)  # AsyncClient._decoded raises ModelFailed otherwise
    return mesh


def _with(mesh: Mesh, latents: Latents | None, facts: PictureFacts) -> Mesh:
    """The mesh of a picture: with its latents, and with what preprocessing told of the picture in the statistics."""
    return dataclasses.replace(mesh, latents=latents, statistics={**mesh.statistics, **facts})


def _connected(url: str | Sequence[str], shared_memory: SharedMemory) -> Transport:
    if isinstance(url, str):
        return transport_to(url, shared_memory=shared_memory)
    return RoundRobin([transport_to(each, shared_memory=shared_memory) for each in url])
