"""The sampler for callers that want one response: HTTP, plain ModelInfer, ensembles.

Each request becomes one decoupled call into hunyuan3d_sampler, so it shares denoiser batches with every stream.
"""

from __future__ import annotations

import asyncio
import json

import triton_python_backend_utils as pb_utils

SAMPLER = "hunyuan3d_sampler"
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._running: set[asyncio.Task] = set()

    async def execute(self, requests: list) -> None:
        for request in requests:
            # Not awaited here: the next request must start while this one steps, or they could never share a batch.
            task = asyncio.get_running_loop().create_task(self._sample(request, request.get_response_sender()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _sample(self, request: object, sender: object) -> None:
        try:
            response = pb_utils.InferenceResponse(await self._final_outputs(request))
        except Exception as error:  # this request's error, and nobody else's
            response = pb_utils.InferenceResponse(error=_as_triton_error(error))
        sender.send(response, flags=_FINAL)

    async def _final_outputs(self, request: object) -> list:
        found = [pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs]
        call = pb_utils.InferenceRequest(
            model_name=SAMPLER,
            requested_output_names=self._outputs,
            inputs=[tensor for tensor in found if tensor is not None],
            timeout=request.timeout(),
        )
        outputs: list = []
        for response in await call.async_exec(decoupled=True):
            if response.has_error():
                raise _SamplerError(response.error())
            outputs = response.output_tensors() or outputs
        return outputs


class _SamplerError(RuntimeError):
    """The sampler's own answer, passed on with its code."""

    def __init__(self, error: pb_utils.TritonError) -> None:
        super().__init__(error.message())
        self.error = error


def _as_triton_error(error: Exception) -> pb_utils.TritonError:
    if isinstance(error, _SamplerError):
        return pb_utils.TritonError(error.error.message(), error.error.code())
    return pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL)
