"""The contract: every model's tensors (name, dtype, dims, meaning), what each model needs, and the range of every free axis.

The config.pbtxt files, optimization profiles, ONNX axes, example inputs and the client's validation are derived from this
table or tested against it. A tensor keeps its name from the torch forward through ONNX, plan and config.pbtxt to the client.
Axes: B batch, L latent tokens, T context tokens, V views of one object, P side of a square picture in pixels, S seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

LATENT_CHANNELS = 64
CONTEXT_WIDTH = 1536

DIT = "hunyuan3d_dit"
DIT_GUIDED = "hunyuan3d_dit_guided"
SAMPLER = "hunyuan3d_sampler"
SAMPLER_UNARY = "hunyuan3d_sampler_unary"
PREPROCESS = "hunyuan3d_preprocess"
CONDITIONER = "hunyuan3d_conditioner"
IMAGE_CONTEXT = "hunyuan3d_context"
ENSEMBLE = "hunyuan3d"
ENSEMBLE_UNARY = "hunyuan3d_unary"
# A request parameter of hunyuan3d_sampler. With it, an error comes as the output `error`: Triton gives an error proper no code
# in a stream or in a call between models.
ERRORS_AS_OUTPUTS = "errors_as_outputs"
VIEWS = ("front", "left", "back", "right")  # their order in a request

# How the velocities of a sample are evaluated: one branch; both branches in one graph; both as two batch rows; or a
# guidance-distilled network's single evaluation.
SamplingPath = Literal["plain", "guided", "two-batch", "distilled"]
PATHS: tuple[SamplingPath, ...] = get_args(SamplingPath)

# Most steps by schedule; the sampler's own table is held against it by a test, as the server has no client package.
SCHEDULES: Mapping[str, int] = {"flow_match": 1000, "consistency": 100}

# Triton's name of a dtype -> numpy's. FP16 and FP32 only for big tensors: tritonclient encodes BF16 in a Python loop.
NUMPY_DTYPES: Mapping[str, type[np.generic]] = {
    "FP16": np.float16,
    "FP32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "BYTES": np.object_,
}


@dataclasses.dataclass(frozen=True)
class AxisRange:
    """Smallest, usual and largest size of a free axis: an optimization profile's (min, opt, max)."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"axis range must be 1 <= min <= opt <= max, got {self.min}..{self.opt}..{self.max}")


# T reaches four views of 1370 tokens and one 1022-pixel image of 5330; L is at most one and a third times v2-0's. An axis that is
# missing here is fixed by each exported graph (P) or never reaches a graph (S).
AXES: Mapping[str, AxisRange] = {
    "B": AxisRange(1, 2, 8),
    "L": AxisRange(1, 3072, 4096),
    "T": AxisRange(1, 1370, 5480),
    "V": AxisRange(1, 1, len(VIEWS)),
}
# The axes whose range binds every runtime and not only plans: there are four view vectors, while L and T are free.
BOUNDED_AXES = frozenset({"V"})
# The axes' names in words, as the command line takes them.
AXIS_NAMES: Mapping[str, str] = {"B": "batch", "L": "latents", "T": "context", "V": "views"}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model. dims: axis names (free) or sizes (fixed). values: the smallest and the largest that make sense."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    meaning: str
    optional: bool = False
    values: tuple[int, int] | None = None

    @property
    def numpy_dtype(self) -> type[np.generic]:
        return NUMPY_DTYPES[self.dtype]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for given axis sizes."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One Triton model: its inputs and outputs in the order of the torch call, and the other models that it works with.

    needs: the model is served only where one of each group's models is served too. steps: the models that an ensemble calls,
    in their order; an ensemble needs all of them.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    needs: tuple[tuple[str, ...], ...] = ()
    steps: tuple[str, ...] = ()

    @property
    def axes(self) -> Mapping[str, AxisRange]:
        """The free axes of the inputs that have a range, in their order."""
        dims = [dim for tensor in self.inputs for dim in tensor.dims if isinstance(dim, str)]
        return {dim: AXES[dim] for dim in dict.fromkeys(dims) if dim in AXES}

    def sized(self, sizes: Mapping[str, int]) -> ModelSpec:
        """The spec with these axes' sizes in their place."""

        def fixed(tensor: TensorSpec) -> TensorSpec:
            dims = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in tensor.dims)
            return dataclasses.replace(tensor, dims=dims)

        return dataclasses.replace(self, inputs=tuple(map(fixed, self.inputs)), outputs=tuple(map(fixed, self.outputs)))

    def input(self, name: str) -> TensorSpec:
        return next(spec for spec in self.inputs if spec.name == name)


LATENTS = TensorSpec("latents", "FP32", ("B", "L", LATENT_CHANNELS), "the ODE state")
T_FLOW = TensorSpec("t", "FP32", ("B",), "flow time in [0, 1]; 0 is noise, 1 is data", values=(0, 1))
CONTEXT = TensorSpec("context", "FP16", ("B", "T", CONTEXT_WIDTH), "condition tokens")
GUIDANCE = TensorSpec("guidance", "FP32", ("B",), "raw guidance scale of guidance-distilled weights")
GUIDANCE_SCALE = TensorSpec("guidance_scale", "FP32", ("B",), "classifier-free guidance scale")
IMAGE = TensorSpec("image", "BYTES", ("V",), "PNG, JPEG or WebP files of the views front, left, back, right")
PIXELS = TensorSpec("pixels", "FP32", ("B", "V", 3, "P", "P"), "square pictures, ImageNet's mean and deviation taken out")
VELOCITY = TensorSpec("velocity", "FP32", ("B", "L", LATENT_CHANNELS), "points from noise to data")


def denoiser(*, guided: bool = False, guidance_embed: bool = False) -> ModelSpec:
    """The spec of hunyuan3d_dit (with `guidance` for guidance-distilled weights) or of hunyuan3d_dit_guided.

    Raises ValueError for a guided graph of guidance-distilled weights: there is none.
    """
    if guided and guidance_embed:
        raise ValueError("guided must be False for guidance-distilled weights, got True")
    extra = (GUIDANCE_SCALE,) if guided else (GUIDANCE,) if guidance_embed else ()
    return ModelSpec(DIT_GUIDED if guided else DIT, (LATENTS, T_FLOW, CONTEXT, *extra), (VELOCITY,))


def _optional(spec: TensorSpec) -> TensorSpec:
    return dataclasses.replace(spec, optional=True)


def _scalar(name: str, dtype: str, meaning: str) -> TensorSpec:
    return TensorSpec(name, dtype, (1,), meaning, optional=True)


SAMPLER_INPUTS = (
    CONTEXT,
    TensorSpec(
        "negative_context",
        "FP16",
        ("B", "T", CONTEXT_WIDTH),
        "condition of the unconditional branch; default zeros",
        optional=True,
    ),
    dataclasses.replace(_optional(LATENTS), meaning="initial noise; default drawn from seed"),
    _scalar("num_latents", "INT32", "L of the drawn noise"),
    _scalar("steps", "INT32", "number of steps of the schedule"),
    _scalar("guidance_scale", "FP32", "classifier-free guidance scale, or the raw guidance of distilled weights"),
    TensorSpec("seed", "INT64", ("S",), "one seed (sample i uses seed + i) or one for each sample", optional=True),
    _scalar("schedule", "BYTES", " or ".join(SCHEDULES)),
    _scalar("preview_every", "INT32", "latents in every k-th step's response; 0: in the final one only"),
)
SAMPLER_OUTPUTS = (
    dataclasses.replace(LATENTS, meaning="the state after this step; in previews and the final response", optional=True),
    TensorSpec("step", "INT32", (1,), "steps done, from 1"),
    TensorSpec("total", "INT32", (1,), "steps in all"),
    TensorSpec("t", "FP32", (1,), "flow time reached"),
    TensorSpec("batch", "INT32", (1,), "samples of this step's last denoiser call, those of other requests included"),
    TensorSpec("path", "BYTES", (1,), "how each velocity is evaluated: " + ", ".join(PATHS)),
    TensorSpec(
        "vae_latents",
        "FP32",
        ("B", "L", LATENT_CHANNELS),
        "latents / scale_factor, as the VAE takes them; in the final response",
        optional=True,
    ),
)
ERROR = TensorSpec("error", "BYTES", (2,), "in place of all others: code and text of what ended the request", optional=True)


def _for_one_response(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Of the sampler's inputs, those that make sense where only the final response is given."""
    return tuple(spec for spec in inputs if spec.name != "preview_every")


def _for_ensembles(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Of a sampler's inputs, its options. No initial latents: in an ensemble an input and an output cannot share a name."""
    return tuple(spec for spec in inputs if spec.name not in ("context", "negative_context", "latents"))


_UNARY_INPUTS = _for_one_response(SAMPLER_INPUTS)
_PICTURE_STEPS = (PREPROCESS, CONDITIONER)
# Every model that a repository may hold. A repository without an image encoder has none of those that need one.
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        denoiser(),
        denoiser(guided=True),
        ModelSpec(SAMPLER, SAMPLER_INPUTS, (*SAMPLER_OUTPUTS, ERROR), needs=((DIT, DIT_GUIDED),)),
        ModelSpec(SAMPLER_UNARY, _UNARY_INPUTS, SAMPLER_OUTPUTS),
        ModelSpec(PREPROCESS, (IMAGE,), (PIXELS,), needs=((CONDITIONER,),)),
        ModelSpec(CONDITIONER, (PIXELS,), (CONTEXT,)),
        ModelSpec(IMAGE_CONTEXT, (IMAGE,), (CONTEXT,), steps=_PICTURE_STEPS),
        ModelSpec(ENSEMBLE, (IMAGE, *_for_ensembles(SAMPLER_INPUTS)), SAMPLER_OUTPUTS, steps=(*_PICTURE_STEPS, SAMPLER)),
        ModelSpec(
            ENSEMBLE_UNARY, (IMAGE, *_for_ensembles(_UNARY_INPUTS)), SAMPLER_OUTPUTS, steps=(*_PICTURE_STEPS, SAMPLER_UNARY)
        ),
    )
}
