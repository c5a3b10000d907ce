"""The messages: KServe v2 over gRPC, as Triton speaks it. Requests to bytes, responses to arrays.

Of tritonclient this client takes the protocol's messages. Its own class copies every tensor three times before the socket
does; here a request's big parts are joined once.

An error of a stream carries no status. Triton's header for one (triton_grpc_error) can bring the server down: 24.10 crashed
when it refused requests that way. So the sampler is asked to answer with its errors, see contract.ERRORS_AS_OUTPUTS.
"""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from . import contract
from .shared_memory import Segment
from .transport import Request, StatusError, Tensors

_DATATYPES = {np.dtype(dtype): name for name, dtype in contract.NUMPY_DTYPES.items()}
# The sampler's codes are the names of Triton's TritonError: some differ from gRPC's.
_STATUSES = {status.name: status for status in grpc.StatusCode} | {
    "INVALID_ARG": grpc.StatusCode.INVALID_ARGUMENT,
    "UNSUPPORTED": grpc.StatusCode.UNIMPLEMENTED,
}
_RAW_INPUT_TAG = bytes([pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2])  # protobuf: field number, bytes


def message(request: Request, segment: Segment | None, timeout_s: float) -> bytes:
    """A ModelInferRequest, serialized. Tensors that have a place in `segment` are written there and only pointed at."""
    head = pb.ModelInferRequest(model_name=request.model, id=request.request_id)
    # Microseconds; enforced by the model, also where cancelling cannot reach.
    head.parameters["timeout"].int64_param = max(1, int(timeout_s * 1e6))
    if request.streamed:
        head.parameters[contract.ERRORS_AS_OUTPUTS].bool_param = True
    places = segment.places if segment else {}
    parts: list[Any] = []
    for name, array in request.inputs.items():
        tensor = head.inputs.add(name=name, datatype=_DATATYPES[array.dtype], shape=array.shape)
        if segment and name in places:
            segment.write(name, array)
            _point(tensor.parameters, segment, name)
        else:
            content = serialize_byte_tensor(array).item() if array.dtype == np.object_ else np.ascontiguousarray(array)
            parts += _RAW_INPUT_TAG, _varint(len(content) if isinstance(content, bytes) else content.nbytes), content
    for name in request.output_bytes.keys() & places.keys():
        _point(head.outputs.add(name=name).parameters, segment, name)
    return b"".join([head.SerializeToString(), *parts])


def _point(parameters: Any, segment: Segment | None, name: str) -> None:
    assert segment is not None
    place = segment.places[name]
    parameters["shared_memory_region"].string_param = segment.name
    parameters["shared_memory_byte_size"].int64_param = place.stop - place.start
    parameters["shared_memory_offset"].int64_param = place.start


def _varint(number: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first, all but the last marked."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def tensors(response: Any, segment: Segment | None) -> Tensors:
    """The outputs of a ModelInferResponse. Raises StatusError where they don't fit what it says of them."""
    raw = iter(response.raw_output_contents)
    try:
        return {output.name: _tensor(output, raw, segment) for output in response.outputs}
    except (KeyError, ValueError) as error:
        message = f"each output must fit its datatype and shape, got {error}\nhint: see the server's version"
        raise StatusError(grpc.StatusCode.INTERNAL, message) from error


def refusal(answer: Tensors) -> StatusError | None:
    """The error that an answer carries in the output `error`, or None for an answer without that output."""
    found = answer.get(contract.ERROR.name)
    if found is None:
        return None
    if found.shape != contract.ERROR.dims or found.dtype != contract.ERROR.numpy_dtype:
        message = f"error must be a code and a text, got {found.dtype} {list(found.shape)}\nhint: redeploy the sampler"
        return StatusError(grpc.StatusCode.INTERNAL, message)
    code, text = (part.decode(errors="replace") for part in found)
    return StatusError(_STATUSES.get(code, grpc.StatusCode.UNKNOWN), text)


def _tensor(output: Any, raw: Any, segment: Segment | None) -> npt.NDArray[Any]:
    content = next(raw, b"")  # there and empty for an output in shared memory
    if segment is not None and not content and output.name in segment.places:
        content = segment.read(output.name)
    if output.datatype == "BYTES":
        return np.asarray(deserialize_bytes_tensor(content)).reshape(output.shape)
    return np.frombuffer(content, contract.NUMPY_DTYPES[output.datatype]).reshape(output.shape)
