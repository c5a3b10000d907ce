"""A real photograph for the demo, and requests to the ensembles as any KServe client would send them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from hunyuan3d_client import contract


def photograph() -> bytes:
    """The PNG file of scikit-image's coffee cup. Raises ImportError without scikit-image (extra `test`)."""
    import skimage

    return (Path(skimage.__file__).parent / "data" / "coffee.png").read_bytes()


def in_front_of_a_wall(solid: bytes) -> bytes:
    """A PNG file of a drawn solid, which has alpha, before scikit-image's photograph of bricks, as RGB. Raises ImportError without it."""
    import skimage
    from PIL import Image

    with Image.open(io.BytesIO(solid)) as drawn, Image.open(Path(skimage.__file__).parent / "data" / "brick.png") as bricks:
        wall = bricks.convert("RGB").resize((2 * drawn.width, 2 * drawn.height))
        wall.paste(drawn, (drawn.width // 2, drawn.height // 2), mask=drawn.getchannel("A"))
    file = io.BytesIO()
    wall.save(file, "PNG")
    return file.getvalue()


def ensemble_latents(url: str, image: bytes, options: Mapping[str, int]) -> NDArray[np.float32]:
    """Latents [1, L, 64] from the ensemble hunyuan3d_latents_unary. options: values of the sampler's inputs."""
    latents: NDArray[np.float32] = _ask(url, contract.PICTURE_LATENTS_UNARY, image, options).as_numpy("latents")
    return latents


def ensemble_mesh(url: str, image: bytes, options: Mapping[str, int]) -> bytes:
    """A GLB file from the ensemble hunyuan3d_unary. options: values of the inputs of the sampler and of the mesh."""
    return bytes(_ask(url, contract.PICTURE_MESH_UNARY, image, options).as_numpy("mesh"))


def _ask(url: str, model: str, image: bytes, options: Mapping[str, int]) -> Any:
    tensors = {"image": np.array([image, None], np.object_)[:1]}  # without None, NumPy takes the bytes for a string
    types = {spec.name: spec.numpy_dtype for spec in (*contract.SAMPLER_INPUTS, *contract.MESH_OPTIONS)}
    tensors |= {name: np.array([value], types[name]) for name, value in options.items()}
    inputs = []
    for name, value in tensors.items():
        tensor = tritonclient.grpc.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        inputs.append(tensor.set_data_from_numpy(value))
    with tritonclient.grpc.InferenceServerClient(url) as client:
        return client.infer(model, inputs)
