"""One call of another model of this server. The sampler and hunyuan3d_mesh, which links to this file, make all their calls by it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from outcomes import Ended

# This request parameter tells a Python model that the caller checks all values for NaN, before the call and after it.
CHECKED = "checked"


async def call(
    triton: Any,
    model: str,
    inputs: Sequence[Any],
    outputs: Sequence[str],
    *,
    limit_s: float,
    caller: str,
    **options: Any,
) -> list[Any]:
    """The tensors `outputs` of a model's answer. triton: pb_utils. caller: the model whose config has the time limit.

    options: further arguments of pb_utils.InferenceRequest. Raises Ended when the model fails or does not answer in time.
    """
    request = triton.InferenceRequest(
        model_name=model, requested_output_names=list(outputs), inputs=list(inputs), parameters={CHECKED: True}, **options
    )
    try:
        response = await asyncio.wait_for(request.async_exec(), limit_s)
    except asyncio.TimeoutError as error:
        hint = f"hint: raise evaluation_timeout_s in {caller}'s config.pbtxt"
        raise Ended(f"{model} must answer within {limit_s:g} s, got nothing\n{hint}") from error
    except triton.TritonModelException as error:
        raise Ended(f"{model} must answer, got {error}\nhint: the server's log says more") from error
    if response.has_error():
        raise Ended(f"{model} must answer, got {response.error().message()}\nhint: the server's log says more")
    return [triton.get_output_tensor_by_name(response, name) for name in outputs]
