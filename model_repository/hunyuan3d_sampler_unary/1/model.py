"""The sampler for callers that want one response: HTTP, plain ModelInfer, ensembles.

Each request becomes one decoupled call into hunyuan3d_sampler, so it shares denoiser batches with every stream.
"""

from __future__ import annotations

import asyncio
import json

import triton_python_backend_utils as pb_utils

SAMPLER = "hunyuan3d_sampler"
ERRORS_AS_OUTPUTS = "errors_as_outputs"  # see the sampler's model.py
VAE_LATENTS = "vae_latents"
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
            request_id=request.request_id(),
            model_name=SAMPLER,
            # Everything but what is made on demand: `path` carries the sampler's errors.
            requested_output_names=[
                name for name in self._outputs if name != VAE_LATENTS or name in request.requested_output_names()
            ],
            inputs=[tensor for tensor in found if tensor is not None],
            timeout=request.timeout(),
            parameters={ERRORS_AS_OUTPUTS: True},
        )
        outputs: dict[str, object] = {}
        for response in await call.async_exec(decoupled=True):
            if response.has_error():
                raise SamplerError("INTERNAL", response.error().message())
            outputs = {tensor.name(): tensor for tensor in response.output_tensors()} or outputs
        if outputs.keys() == {"path"}:
            raise SamplerError(*(part.decode() for part in outputs["path"].as_numpy()))
        return list(outputs.values())


class SamplerError(RuntimeError):
    """The sampler's own answer: code is the name of one of pb_utils.TritonError's."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _as_triton_error(error: Exception) -> object:
    code = error.code if isinstance(error, SamplerError) else "INTERNAL"
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, code))
