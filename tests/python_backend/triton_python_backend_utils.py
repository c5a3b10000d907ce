"""A stand-in for the module that Triton's Python backend provides to models, with as much of it as our models use.

tests/served tests the real module. This stand-in is only as strict as the logic of a model needs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU = "CPU", "GPU"


class PreferredMemory:
    """The memory in which a call between models wants its answer."""

    def __init__(self, preferred_memory_type: str, preferred_device_id: int = 0) -> None:
        self.memory, self.device = preferred_memory_type, preferred_device_id


class TritonModelException(Exception):
    """A stand-in for the exception of this name."""


class TritonError:
    """An error with a code. Here each code is a string that holds its own name."""

    INTERNAL, INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED = "INTERNAL INVALID_ARG NOT_FOUND UNAVAILABLE CANCELLED".split()

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._outputs, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """For tests: the outputs by name."""
        return {tensor.name(): tensor.as_numpy() for tensor in self._outputs}


class InferenceRequest:
    """A call between models. Tests set `answer`, a function that gets the call and returns the response."""

    answer: Callable[[InferenceRequest], Awaitable[Any]]

    def __init__(self, **options: Any) -> None:
        self.options = options

    async def async_exec(self, *, decoupled: bool = False) -> Any:
        self.decoupled = decoupled
        return await type(self).answer(self)


class MetricFamily:
    """Metrics that accept every value and keep none."""

    COUNTER = GAUGE = HISTOGRAM = "kind"

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert name.startswith("hunyuan3d_") and description and kind

    def Metric(self, *, labels: dict[str, str], **_: object) -> SimpleNamespace:
        assert isinstance(labels, dict)
        return SimpleNamespace(increment=lambda _: None, set=lambda _: None, observe=lambda _: None)


class Logger:
    """A log that tests read and clear."""

    lines: list[str] = []

    log_info = log_warn = log_error = lines.append


class Sender:
    """Keeps the responses that a decoupled model sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[InferenceResponse, int]] = []

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return False


class Request:
    """A request as a model gets it. `parameters` is JSON text as in Triton, and empty for no parameters."""

    def __init__(
        self, arrays: dict[str, np.ndarray], *, outputs: Sequence[str] = (), parameters: str = "", request_id: str = "an-id"
    ) -> None:
        self.tensors = {name: Tensor(name, array) for name, array in arrays.items()}
        self.sender = Sender()
        self._outputs, self._parameters, self._request_id = list(outputs), parameters, request_id

    def request_id(self) -> str:
        return self._request_id

    def requested_output_names(self) -> set[str]:
        return set(self._outputs)

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return 0

    def get_response_sender(self) -> Sender:
        return self.sender


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def is_model_ready(_name: str) -> bool:
    return True
