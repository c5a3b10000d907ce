"""AsyncClient: arguments in, arrays out; the work between is requests.py's and exchange.py's.

Axes: B batch, L latent tokens, T context tokens. Arrays may be NumPy's, torch's, cupy's or nested lists; context and
latents without the batch axis mean B = 1. `t`, `guidance` and a denoiser's `guidance_scale` are one number or B numbers.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract, requests
from .errors import InvalidInput, ModelFailed, ModelNotReady, invalid
from .exchange import Exchange, one
from .grpc_transport import GrpcTransport, SharedMemory
from .images import ImageCalls
from .requests import Scalars, Step
from .round_robin import RoundRobin
from .transport import Health, ModelInfo, Request, Transport

Inputs = dict[str, npt.NDArray[Any]]
Latents = npt.NDArray[np.float32]
_LONGEST_S = 86_400.0
_DEFAULT_URL = "localhost:8001"


class AsyncClient(ImageCalls):
    """A client for asyncio. At most `max_in_flight` requests at a time, others wait within their timeout.

    `url` is a server's host:port, a list of several with the same models (calls take turns, see RoundRobin), or
    dns:///name:port for all of a name's addresses; left out, localhost:8001. `transport` stands in for all that:
    GrpcTransport with TLS or headers, RoundRobin, MockTransport. `shared_memory`: see GrpcTransport.
    `timeout_s` is the default of every call. A request that was refused or not delivered is sent again up to `retries`
    times, with exponential backoff and jitter and within a budget of all calls; one answered in part never is.
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
        """Close the channel; calls in flight raise Cancelled."""
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
        A batch larger than the server's limit is split, sent side by side and joined. The result may be read-only: where
        nothing was joined it is the received message itself, without a copy.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        name, inputs = requests.denoise(latents, t, context, guidance=guidance, guidance_scale=guidance_scale)
        deadline = self._deadline(timeout_s)
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

    async def sample(
        self,
        context: Any,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        num_latents: int | None = None,
        latents: Any = None,
        negative_context: Any = None,
        schedule: str | None = None,
        timeout_s: float | None = None,
    ) -> Latents:
        """The latents [B, L, 64] float32 at the end of a trajectory under context [B, T, 1536].

        None leaves an option to the deployed preset. Sample i draws its noise [num_latents, 64] from seed + i, or from
        seed[i]; `latents` gives the noise instead. `guidance_scale` is the classifier-free scale, or the raw guidance
        of distilled weights; `negative_context` replaces the zeros of the unconditional branch.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        trajectory = self.stream(
            context,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            num_latents=num_latents,
            latents=latents,
            negative_context=negative_context,
            schedule=schedule,
            preview_every=0,
            timeout_s=timeout_s,
        )
        async for step in trajectory:
            last = step.latents
        assert last is not None  # the trajectory's own check
        return last

    def stream(
        self,
        context: Any,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        num_latents: int | None = None,
        latents: Any = None,
        negative_context: Any = None,
        schedule: str | None = None,
        preview_every: int = 1,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Step, None]:
        """The Steps of a trajectory as they are made: sample() with latents in every `preview_every`-th (0: the last only).

        Leaving the loop early, by break or exception, cancels the trajectory on the server.
        Raises InvalidInput at once, and what sample() raises while iterating.
        """
        options = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "num_latents": num_latents,
            "latents": latents,
            "negative_context": negative_context,
            "schedule": schedule,
            "preview_every": preview_every,
        }
        inputs = requests.sample(context, options)
        return self._trajectory(inputs, self._deadline(timeout_s))

    async def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether the server is live and ready, its version and its models. Raises ServerUnavailable, DeadlineExceeded."""
        deadline = self._deadline(timeout_s)
        return await self._exchange.ask(lambda left_s: self._transport.health(timeout_s=left_s), model="", deadline=deadline)

    async def model_info(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """What the server says of one model: inputs, batch limit, parameters. Raises ModelNotReady, ServerUnavailable."""
        return await self._exchange.model(name, deadline=self._deadline(timeout_s), fresh=True)

    async def _conform(self, name: str, inputs: Inputs, deadline: float) -> tuple[ModelInfo, Inputs]:
        """The inputs as the server's model wants them; what it said before is asked again before it refuses anything."""
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

    async def _trajectory(self, inputs: Inputs, deadline: float) -> AsyncGenerator[Step, None]:
        _, inputs = await self._conform(contract.SAMPLER, inputs, deadline)
        request = Request(contract.SAMPLER, inputs, uuid.uuid4().hex, streamed=True)
        last = None
        async with aclosing(self._exchange.infer(request, requests.step, deadline=deadline)) as steps:
            async for last in steps:
                yield last
        if last is None or last.index != last.total or last.latents is None:
            message = f"a trajectory must end with its last step's latents, got {last}\nhint: {ModelFailed.hint}"
            raise ModelFailed(message, request_id=request.request_id, model=request.model, attempt=1)

    def _deadline(self, timeout_s: float | None) -> float:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if not (isinstance(limit_s, (int, float)) and 0 < limit_s <= _LONGEST_S):
            raise invalid(
                "timeout_s", f"seconds, above 0 and at most {_LONGEST_S}", repr(limit_s), "leave it out for the client's"
            )
        return time.monotonic() + limit_s


def _connected(url: str | Sequence[str], shared_memory: SharedMemory) -> Transport:
    if isinstance(url, str):
        return GrpcTransport(url, shared_memory=shared_memory)
    return RoundRobin([GrpcTransport(each, shared_memory=shared_memory) for each in url])
