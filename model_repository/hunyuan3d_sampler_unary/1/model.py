"""A streaming model for callers that want a single response: HTTP, plain ModelInfer, and ensembles.

It calls the model of its own name without `_unary`: hunyuan3d_sampler or hunyuan3d_mesh. Each request becomes one streamed call, so
it shares the calls of the networks with all other requests. hunyuan3d_mesh_unary links to this file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import half
import parameters
import triton_python_backend_utils as pb_utils
from streaming import ERROR, ERRORS_AS_OUTPUTS, FINAL

_SUFFIX = "_unary"
_MOST_REQUESTS = 256  # more than the called models admit at the same time
VAE_LATENTS = "vae_latents"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters.parse(parameters.NoOptions, parameters.of_config(config))
        self._called = config["name"].removesuffix(_SUFFIX)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._running: set[asyncio.Task] = set()
        self._threads = ThreadPoolExecutor(_MOST_REQUESTS, "responses")

    async def execute(self, requests: list) -> None:
        for request in requests:
            # Not awaited here: the next request must begin before this one ends, or the two could never share a batch.
            task = asyncio.get_running_loop().create_task(self._answer(request, request.get_response_sender()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, request: object, sender: object) -> None:
        # Referenced until the response is sent, because Triton 24.10 frees outputs that the caller did not ask for, and the
        # iterator of a finished call, in threads that do not hold Python's lock. As long as there are references here, nothing
        # of Python's is freed there.
        kept: list[object] = []
        try:
            outputs = await self._final_outputs(request, kept)
            response = pb_utils.InferenceResponse(outputs)
        except Exception as error:  # only this request fails
            response = pb_utils.InferenceResponse(error=_as_triton_error(error))
        sender.send(response, flags=FINAL)
        kept.clear()

    def _called_inputs(self, request: object) -> list:
        """The request's tensors as the called model declares them: what came in float32 in place of float16 is cast."""
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        given = {name: tensor for name, tensor in found.items() if tensor is not None}
        arrays = {name: given.pop(name).as_numpy() for name in half.twins(given, self._inputs)}
        return [*given.values(), *(pb_utils.Tensor(name, array) for name, array in half.cast(arrays).items())]

    async def _final_outputs(self, request: object, kept: list[object]) -> list:
        """The outputs of the called model's last response. The responses and the outputs are added to `kept`.

        Raises CalledModelError when it answers with an error, ValueError for a bad input.
        """
        # The sampler computes vae_latents only for those who ask for it; the other outputs cost nothing.
        unwanted = {VAE_LATENTS} - set(request.requested_output_names())
        call = pb_utils.InferenceRequest(
            request_id=request.request_id(),
            model_name=self._called,
            requested_output_names=[*(name for name in self._outputs if name not in unwanted), ERROR],
            inputs=self._called_inputs(request),
            timeout=request.timeout(),
            parameters={ERRORS_AS_OUTPUTS: True},
        )
        responses = await call.async_exec(decoupled=True)
        kept.append(responses)
        # In a thread, because the wait for the next response would stop the event loop and with it all other requests.
        outputs: list = await asyncio.get_running_loop().run_in_executor(self._threads, _last, responses)
        kept.append(outputs)
        return outputs

    def finalize(self) -> None:
        self._threads.shutdown(wait=False)


def _last(responses: Iterable) -> list:
    """The outputs of the last response that has any."""
    outputs: dict[str, object] = {}
    for response in responses:
        if response.has_error():
            raise CalledModelError("INTERNAL", response.error().message())
        outputs = {tensor.name(): tensor for tensor in response.output_tensors()} or outputs
        if ERROR in outputs:
            raise CalledModelError(*(part.decode() for part in outputs[ERROR].as_numpy()))
    return list(outputs.values())


class CalledModelError(RuntimeError):
    """The called model answered with an error; `code` is the name of a code in pb_utils.TritonError."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _as_triton_error(error: Exception) -> object:
    code = error.code if isinstance(error, CalledModelError) else "INVALID_ARG" if isinstance(error, ValueError) else "INTERNAL"
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, code))
