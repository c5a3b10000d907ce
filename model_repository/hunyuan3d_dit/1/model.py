"""One network served in Triton's Python backend (configs/cpu.pbtxt, torch.pbtxt, rtx.pbtxt); its config names all tensors.

hunyuan3d_dit_guided and hunyuan3d_conditioner link to this file and to its neighbours. A TensorRT plan and Triton's own ONNX
Runtime backend need no Python code.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import batching
import parameters
import triton_python_backend_utils as pb_utils

# Each of these modules has Options, Network, LIBRARY, to_array and to_tensor. Only the one that the config asks for is imported:
# a server without torch serves graphs.
RUNTIMES = {"onnxruntime": "onnx_graph", "torch": "torch_network", "tensorrt_rtx": "rtx_plan"}
# Runtime -> the extra of this project's package that installs what the runtime needs.
_EXTRAS = {"onnxruntime": "export", "torch": "export", "tensorrt_rtx": "rtx"}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options, texts = parameters.split(batching.Options, parameters.of_config(config))
        self._runtime = _runtime(options.runtime)
        path = Path(args["model_repository"]) / args["model_version"] / options.model_file
        outputs = [tensor["name"] for tensor in config["output"]]
        self._network = self._runtime.Network(path, parameters.parse(self._runtime.Options, texts), outputs)
        self._inputs = batching.Inputs(
            config["input"], options.limits, self._network.fixed_sizes, library=self._runtime.LIBRARY
        )

    def execute(self, requests: list) -> list:
        decoded = [self._decode(request) for request in requests]
        results = self._compute(decoded)
        return [self._encode(request, result) for request, result in zip(requests, results, strict=True)]

    def _decode(self, request: object) -> batching.Tensors | Exception:
        """The request's tensors, or the reason why the network cannot take them: a neighbour must not suffer for it."""
        try:
            tensors = {
                name: self._runtime.to_array(pb_utils.get_input_tensor_by_name(request, name)) for name in self._inputs.names
            }
            is_checked = json.loads(request.parameters() or "{}").get(batching.CHECKED) is True
            return self._inputs.prepare(tensors, check_values=not is_checked)
        except Exception as error:
            return error

    def _compute(self, requests: list[batching.Tensors | Exception]) -> list[batching.Tensors | Exception]:
        return batching.evaluate(requests, self._network.run, self._runtime.LIBRARY)

    def _encode(self, request: object, result: batching.Tensors | Exception) -> object:
        if isinstance(result, Exception):
            pb_utils.Logger.log_error(f"request {request.request_id()!r} failed: {result!r}")
            is_bad_request = isinstance(result, batching.InvalidInput)
            code = pb_utils.TritonError.INVALID_ARG if is_bad_request else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), code))
        return pb_utils.InferenceResponse(
            [self._runtime.to_tensor(pb_utils.Tensor, name, array) for name, array in result.items()]
        )


def _runtime(name: str) -> ModuleType:
    if name not in RUNTIMES:
        raise pb_utils.TritonModelException(f"runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
    try:
        return importlib.import_module(RUNTIMES[name])
    except ModuleNotFoundError as error:
        raise _missing(name, error) from error


def _missing(runtime: str, error: ModuleNotFoundError) -> Exception:
    return pb_utils.TritonModelException(
        f"runtime {runtime} must have its packages in the server's Python, missing {error.name}\n"
        f"hint: in the project's folder, with the server's Python: python3 -m pip install '.[{_EXTRAS[runtime]}]'"
    )
