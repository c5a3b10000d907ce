"""The messages: KServe v2 over gRPC, as Triton speaks it. Requests become bytes, responses become arrays.

From tritonclient this client uses only the protocol's message classes. The client class there copies every tensor three times
before the socket does; here the parts of a request are joined once.

Triton gives the errors of a stream no status. Its header triton_grpc_error would add one, but can bring the server down: 24.10
crashed when it refused requests that way. So this client asks streaming models to send their errors as an output, see
contract.ERRORS_AS_OUTPUTS.
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
# The codes in these errors are the names in Triton's TritonError, of which some differ from gRPC's.
_STATUSES = {status.name: status for status in grpc.StatusCode} | {
    "INVALID_ARG": grpc.StatusCode.INVALID_ARGUMENT,
    "UNSUPPORTED": grpc.StatusCode.UNIMPLEMENTED,
}
_RAW_INPUT_TAG = bytes([pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2])  # protobuf: field number, bytes


def message(request: Request, segment: Segment | None, timeout_s: float) -> bytes:
    """A serialized ModelInferRequest. Tensors with a place in `segment` are written there, and the message points to them."""
    head = pb.ModelInferRequest(model_name=request.model, id=request.request_id)
    # In microseconds. The model enforces it, also where the cancelling of a call does not reach the model.
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
    for name in dict.fromkeys((*request.outputs, *(request.output_bytes.keys() & places.keys()))):
        output = head.outputs.add(name=name)
        if name in request.output_bytes and name in places:
            _point(output.parameters, segment, name)
    return b"".join([head.SerializeToString(), *parts])


def _point(parameters: Any, segment: Segment | None, name: str) -> None:
    assert segment is not None
    place = segment.places[name]
    parameters["shared_memory_region"].string_param = segment.name
    parameters["shared_memory_byte_size"].int64_param = place.stop - place.start
    parameters["shared_memory_offset"].int64_param = place.start


def _varint(number: int) -> bytes:
    """A length as protobuf writes it: seven bits in each byte, the lowest first, and a mark in every byte but the last."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def tensors(response: Any, segment: Segment | None) -> Tensors:
    """The outputs of a ModelInferResponse. Raises StatusError if one does not fit its declared datatype and shape."""
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
        message = f"error must be a code and a text, got {found.dtype} {list(found.shape)}\nhint: redeploy the model"
        return StatusError(grpc.StatusCode.INTERNAL, message)
    code, text = (part.decode(errors="replace") for part in found)
    return StatusError(_STATUSES.get(code, grpc.StatusCode.UNKNOWN), text)


def _tensor(output: Any, raw: Any, segment: Segment | None) -> npt.NDArray[Any]:
    content = next(raw, b"")  # an output in shared memory has an empty content here
    if segment is not None and not content and output.name in segment.places:
        content = segment.read(output.name)
    if output.datatype == "BYTES":
        return np.asarray(deserialize_bytes_tensor(content)).reshape(output.shape)
    return np.frombuffer(content, contract.NUMPY_DTYPES[output.datatype]).reshape(output.shape)
