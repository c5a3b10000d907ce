"""The contract: every model's tensors (name, dtype, dims, meaning), what each model needs, and the range of every free axis.

The config.pbtxt files, optimization profiles, ONNX axes, example inputs and the client's validation are derived from this
table or tested against it. A tensor keeps its name from the torch forward through ONNX, plan and config.pbtxt to the client.
Axes: B batch, L latent tokens, T context tokens, V views of one object, P query points of one shape, H heads of the shape
decoder, S seeds; `side` is that of a square picture in pixels, `bytes` the size of a mesh file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

LATENT_CHANNELS = 64
CONTEXT_WIDTH = 1536
HEAD_SIZE = 64  # of the shape decoder's keys and values

DIT = "hunyuan3d_dit"
DIT_GUIDED = "hunyuan3d_dit_guided"
DENOISERS = (DIT, DIT_GUIDED)
SAMPLER = "hunyuan3d_sampler"
SAMPLER_UNARY = "hunyuan3d_sampler_unary"
PREPROCESS = "hunyuan3d_preprocess"
CONDITIONER = "hunyuan3d_conditioner"
BACKGROUND = "hunyuan3d_background"
IMAGE_CONTEXT = "hunyuan3d_context"
VAE = "hunyuan3d_vae"
FIELD = "hunyuan3d_field"
MESH = "hunyuan3d_mesh"
MESH_UNARY = "hunyuan3d_mesh_unary"
PICTURE_LATENTS = "hunyuan3d_latents"
PICTURE_LATENTS_UNARY = "hunyuan3d_latents_unary"
PICTURE_MESH = "hunyuan3d"
PICTURE_MESH_UNARY = "hunyuan3d_unary"
# A request parameter of hunyuan3d_sampler and hunyuan3d_mesh. With it, an error is sent as the output `error`, because Triton's
# own errors lose their code in a stream and in a call between models.
ERRORS_AS_OUTPUTS = "errors_as_outputs"
VIEWS = ("front", "left", "back", "right")  # their order in a request

# The end of the name of a half-precision input's float32 twin. hunyuan3d_sampler_unary has these twins because Triton takes no FP16
# in JSON, and gives each input one dtype.
FLOAT32_TWIN = "_fp32"

# How the velocities of a sample are evaluated: one branch without guidance; both branches in one graph; both branches as two
# batch rows; one evaluation of a guidance-distilled network.
SamplingPath = Literal["plain", "guided", "two-batch", "distilled"]
PATHS: tuple[SamplingPath, ...] = get_args(SamplingPath)

# Schedule -> the most steps. The server lacks this package, so the sampler has its own table; a test compares the two.
SCHEDULES: Mapping[str, int] = {"flow_match": 1000, "consistency": 100}

# File formats of meshes and ways to evaluate a field. The server lacks this package, so hunyuan3d_mesh has its own tables; a test
# compares them. follow: only near the surface. dense: at every point of the grid.
MESH_FORMATS = ("glb", "obj", "stl", "ply")
MESH_METHODS = ("follow", "dense")
RESOLUTIONS = (8, 1024)  # cells along each side of the grid, smallest and largest

# What became of a picture's background: it was cut away; the picture's own transparency was used; it stayed, because the request or
# the server's config says so; it stayed, because the server has no hunyuan3d_background.
REMOVED, TRANSPARENT, KEPT, NO_REMOVER = BACKGROUNDS = ("removed", "transparent", "kept", "kept: no remover")

# Triton's name of a dtype -> NumPy's type. BF16 is not used, because tritonclient encodes it in a slow Python loop.
NUMPY_DTYPES: Mapping[str, type[np.generic]] = {
    "FP16": np.float16,
    "FP32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BYTES": np.object_,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class AxisRange:
    """Smallest, usual and largest size of a free axis: (min, opt, max) of an optimization profile."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"axis range must be 1 <= min <= opt <= max, got {self.min}..{self.opt}..{self.max}")


# Numbers of query points. Triton shares a batch only between requests of equal shapes, so a caller of hunyuan3d_field that is not
# alone pads its points to the next of these numbers (by repeating a point) and drops the surplus values.
POINT_BUCKETS = (256, 1024, 4096)
# The largest T holds four views of 1370 tokens, or one 1022-pixel image of 5330. The largest L is one and a third times v2-0's.
# Three axes are missing: each exported graph fixes `side` and H, and S never reaches a graph.
AXES: Mapping[str, AxisRange] = {
    "B": AxisRange(1, 2, 8),
    "L": AxisRange(1, 3072, 4096),
    "T": AxisRange(1, 1370, 5480),
    "V": AxisRange(1, 1, len(VIEWS)),
    "P": AxisRange(1, POINT_BUCKETS[-1], POINT_BUCKETS[-1]),
}
# The axes whose range all runtimes enforce, not only plans: there are just four view vectors, and P bounds the memory of the
# field's attention scores. L and T have no such limit.
BOUNDED_AXES = frozenset({"V", "P"})
# The axes' names in words, as the command line takes them.
AXIS_NAMES: Mapping[str, str] = {"B": "batch", "L": "latents", "T": "context", "V": "views", "P": "points"}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model. dims: names of free axes or sizes of fixed axes. values: smallest and largest valid value."""

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
    """One Triton model: its inputs and outputs in the order of the torch call, and the other models that it calls.

    needs: groups of models. The model is served only where at least one model of each group is served too.
    steps: the models that an ensemble calls, in the order of the calls. An ensemble needs all of them.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    needs: tuple[tuple[str, ...], ...] = ()
    steps: tuple[str, ...] = ()

    @property
    def axes(self) -> Mapping[str, AxisRange]:
        """The ranges of the inputs' free axes, in the order of the inputs. Axes without a range are left out."""
        dims = [dim for tensor in self.inputs for dim in tensor.dims if isinstance(dim, str)]
        return {dim: AXES[dim] for dim in dict.fromkeys(dims) if dim in AXES}

    def sized(self, sizes: Mapping[str, int]) -> ModelSpec:
        """The spec with the axes in `sizes` replaced by their sizes."""

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
PIXELS = TensorSpec("pixels", "FP32", ("B", "V", 3, "side", "side"), "square pictures, ImageNet's mean and deviation taken out")
RGB = TensorSpec("rgb", "FP32", ("B", 3, "side", "side"), "square pictures, levels of 0 to 255", values=(0, 255))
SALIENCY = TensorSpec("saliency", "FP32", ("B", 1, "side", "side"), "how likely a pixel is of the subject, 0 to 1")
VELOCITY = TensorSpec("velocity", "FP32", ("B", "L", LATENT_CHANNELS), "points from noise to data")
QUERIES = TensorSpec("queries", "FP32", ("B", "P", 3), "points x, y, z in about [-1.01, 1.01]")
FIELD_VALUES = TensorSpec("field", "FP32", ("B", "P"), "positive inside the shape, about +1 or -1 away from its surface")


def denoiser(*, guided: bool = False, guidance_embed: bool = False) -> ModelSpec:
    """The spec of hunyuan3d_dit (with `guidance` for guidance-distilled weights) or of hunyuan3d_dit_guided.

    Raises ValueError when both are set, because guidance-distilled weights have no guided graph.
    """
    if guided and guidance_embed:
        raise ValueError("guided must be False for guidance-distilled weights, got True")
    extra = (GUIDANCE_SCALE,) if guided else (GUIDANCE,) if guidance_embed else ()
    return ModelSpec(DIT_GUIDED if guided else DIT, (LATENTS, T_FLOW, CONTEXT, *extra), (VELOCITY,))


# FP16 for half-precision graphs; FP32 for fp32 graphs, because rounding k and v to FP16 would be their largest error by far.
KEYS_VALUES_DTYPES = ("FP16", "FP32")


def _keys_values(dtype: str) -> tuple[TensorSpec, TensorSpec]:
    dims = ("B", "H", "L", HEAD_SIZE)
    return TensorSpec("k", dtype, dims, "keys of one shape"), TensorSpec("v", dtype, dims, "values of one shape")


def vae(keys_values: str = "FP16") -> ModelSpec:
    """The spec of hunyuan3d_vae: the sampler's latents -> what hunyuan3d_field needs of a shape, in the dtype keys_values."""
    latents = dataclasses.replace(LATENTS, meaning="the sampler's final state; the graph divides by the scale factor")
    return ModelSpec(VAE, (latents,), _keys_values(keys_values))


def field(keys_values: str = "FP16") -> ModelSpec:
    """The spec of hunyuan3d_field: points and a shape's keys and values -> the field at these points."""
    return ModelSpec(FIELD, (QUERIES, *_keys_values(keys_values)), (FIELD_VALUES,))


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
    _scalar("tolerance", "FP32", "forecast velocities between evaluations, up to this relative error; 0: evaluate all steps"),
)
REMOVE_BACKGROUND = _scalar("remove_background", "BOOL", "the subject is cut out of pictures without transparency")
PICTURE_FACTS = (
    TensorSpec(
        "background", "BYTES", ("V",), "what became of each picture's background: " + ", ".join(BACKGROUNDS), optional=True
    ),
    TensorSpec("subject_share", "FP32", ("V",), "the part of each picture that is subject, 0 to 1", optional=True),
)
CUTOUT = TensorSpec("cutout", "BYTES", ("V",), "PNG files of the subjects, with transparency around them", optional=True)
VAE_LATENTS = "vae_latents"
SAMPLER_OUTPUTS = (
    dataclasses.replace(LATENTS, meaning="the state after this step; in previews and the final response", optional=True),
    TensorSpec("step", "INT32", (1,), "steps done, from 1"),
    TensorSpec("total", "INT32", (1,), "steps in all"),
    TensorSpec("t", "FP32", (1,), "flow time reached"),
    TensorSpec("batch", "INT32", (1,), "samples of this step's last denoiser call, those of other requests included"),
    TensorSpec("path", "BYTES", (1,), "how each velocity is evaluated: " + ", ".join(PATHS)),
    TensorSpec(
        "evaluated", "INT32", (1,), "samples evaluated at this step, not forecast; 0 for a step of size 0", optional=True
    ),
    TensorSpec("network_evaluations", "INT32", ("B",), "evaluations of each sample; in the final response", optional=True),
    TensorSpec("forecast_error", "FP32", ("B",), "mean relative error of the velocities; in the final response", optional=True),
    TensorSpec(
        VAE_LATENTS,
        "FP32",
        ("B", "L", LATENT_CHANNELS),
        "latents / scale_factor, as upstream's VAE takes them; in the final response",
        optional=True,
    ),
)
ERROR = TensorSpec("error", "BYTES", (2,), "code and text of an error; in place of all other outputs", optional=True)
# A request that asks for this output alone gets no sample. It is answered at once.
SERVED = TensorSpec("served", "BYTES", (1,), "JSON: model -> preset, precision, sha256 and seed of its weights", optional=True)

MESH_OPTIONS = (
    _scalar("resolution", "INT32", "cells along each side of the grid"),
    _scalar("format", "BYTES", " or ".join(MESH_FORMATS)),
    _scalar("max_faces", "INT32", "the mesh is simplified to this many faces; 0: it keeps all"),
    _scalar("keep", "FP32", "parts with fewer faces than this share of the largest part's are left out; 0: all parts stay"),
    _scalar("level", "FP32", "the value of the field at the surface"),
    _scalar("method", "BYTES", " or ".join(MESH_METHODS) + ": points near the surface, or every point of the grid"),
)
MESH_INPUTS = (dataclasses.replace(LATENTS, meaning="the sampler's result of one shape, so B is 1"), *MESH_OPTIONS)
MESH_PROGRESS = (
    TensorSpec("stage", "BYTES", (1,), "what the server works at: keys and values, field, surface, file, or done"),
    TensorSpec("refinement", "INT32", (1,), "refinements of the grid that are done"),
    TensorSpec("refinements", "INT32", (1,), "refinements in all"),
    TensorSpec("evaluations", "INT64", (1,), "points at which the field is known"),
)
MESH_RESULT = (
    TensorSpec("mesh", "UINT8", ("bytes",), "the file; in the final response", optional=True),
    TensorSpec("mesh_format", "BYTES", (1,), "the file's format; in the final response", optional=True),
    TensorSpec("statistics", "BYTES", (1,), "JSON: counts, watertightness, seconds; in the final response", optional=True),
)


def _for_one_response(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The inputs of a sampler that sends only the final response."""
    return tuple(spec for spec in inputs if spec.name != "preview_every")


def _for_ensembles(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The sampler's options. Initial latents are left out, because an ensemble's input and output cannot share a name."""
    return tuple(spec for spec in inputs if spec.name not in ("context", "negative_context", "latents"))


def _with_float32_twins(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The inputs and, for each in FP16, another one in FP32 that may take its place. None of both is required by itself."""
    halves = [spec for spec in inputs if spec.dtype == "FP16"]
    twins = [
        TensorSpec(spec.name + FLOAT32_TWIN, "FP32", spec.dims, f"in place of {spec.name}, for JSON", optional=True)
        for spec in halves
    ]
    return (*(_optional(spec) if spec in halves else spec for spec in inputs), *twins)


def _in_the_only_response(outputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Outputs that a stream has in its final response alone, as a model of one response has them."""
    return tuple(dataclasses.replace(spec, optional=False) for spec in outputs)


_UNARY_INPUTS = _for_one_response(SAMPLER_INPUTS)
_PICTURE_INPUTS = (IMAGE, REMOVE_BACKGROUND, *_for_ensembles(_UNARY_INPUTS), *MESH_OPTIONS)
# An ensemble asks its steps for all of its outputs, whatever its caller asks for, so vae_latents would always be computed.
_ENSEMBLE_STEPS = tuple(spec for spec in SAMPLER_OUTPUTS if spec.name != VAE_LATENTS)
_PICTURE_STEPS = (PREPROCESS, CONDITIONER)
# Every model that a repository may hold. A repository without an image encoder lacks the models that need the encoder.
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        denoiser(),
        denoiser(guided=True),
        ModelSpec(SAMPLER, SAMPLER_INPUTS, (*SAMPLER_OUTPUTS, ERROR, SERVED), needs=((DIT, DIT_GUIDED),)),
        ModelSpec(SAMPLER_UNARY, _with_float32_twins(_UNARY_INPUTS), SAMPLER_OUTPUTS),
        # It calls hunyuan3d_background too, where that is served.
        ModelSpec(PREPROCESS, (IMAGE, REMOVE_BACKGROUND), (PIXELS, *PICTURE_FACTS, CUTOUT), needs=((CONDITIONER,),)),
        ModelSpec(BACKGROUND, (RGB,), (SALIENCY,)),
        ModelSpec(CONDITIONER, (PIXELS,), (CONTEXT,)),
        vae(),
        field(),
        ModelSpec(MESH, MESH_INPUTS, (*MESH_PROGRESS, *MESH_RESULT, ERROR), needs=((VAE,), (FIELD,))),
        ModelSpec(MESH_UNARY, MESH_INPUTS, _in_the_only_response(MESH_RESULT), needs=((MESH,),)),
        # Only ensembles that do not stream have the facts about the pictures: see below.
        ModelSpec(IMAGE_CONTEXT, (IMAGE, REMOVE_BACKGROUND), (CONTEXT, *PICTURE_FACTS), steps=_PICTURE_STEPS),
        ModelSpec(
            PICTURE_LATENTS,
            (IMAGE, REMOVE_BACKGROUND, *_for_ensembles(SAMPLER_INPUTS)),
            _ENSEMBLE_STEPS,
            steps=(*_PICTURE_STEPS, SAMPLER),
        ),
        ModelSpec(
            PICTURE_LATENTS_UNARY,
            (IMAGE, REMOVE_BACKGROUND, *_for_ensembles(_UNARY_INPUTS)),
            (*_ENSEMBLE_STEPS, *PICTURE_FACTS),
            steps=(*_PICTURE_STEPS, SAMPLER_UNARY),
        ),
        # All outputs are the mesh model's. Triton would not load an ensemble whose outputs come from a streaming step and from
        # another step, and it drops steps of whose outputs the caller asks for none, even where later steps need them.
        ModelSpec(PICTURE_MESH, _PICTURE_INPUTS, (*MESH_PROGRESS, *MESH_RESULT), steps=(*_PICTURE_STEPS, SAMPLER_UNARY, MESH)),
        ModelSpec(
            PICTURE_MESH_UNARY,
            _PICTURE_INPUTS,
            (*_in_the_only_response(MESH_RESULT), *PICTURE_FACTS),
            steps=(*_PICTURE_STEPS, SAMPLER_UNARY, MESH_UNARY),
        ),
    )
}
