"""From a caller's arguments to a request's tensors, and from an answer's tensors to results. Pure: no network, no state.

Every name, dtype and range comes from contract.py. Axes: B batch, L latent tokens, T context tokens.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract
from .cutouts import Cutout
from .errors import ModelFailed, ModelNotReady, invalid
from .mesh import Mesh, MeshProgress
from .transport import ModelInfo, Tensors

Array = npt.NDArray[Any]
Scalars = float | Sequence[float] | Array
_RANGES: Mapping[str, tuple[int, int]] = {
    "num_latents": (contract.AXES["L"].min, contract.AXES["L"].max),
    "preview_every": (0, max(contract.SCHEDULES.values())),
    "resolution": contract.RESOLUTIONS,
    "max_faces": (0, int(np.iinfo(np.int32).max)),
}
_CHOICES: Mapping[str, Sequence[str]] = {"format": contract.MESH_FORMATS, "method": contract.MESH_METHODS}
# What the client asks the sampler for. vae_latents would double the final response.
STEP_OUTPUTS = (*(spec.name for spec in contract.SAMPLER_OUTPUTS if spec.name != contract.VAE_LATENTS), contract.ERROR.name)

_ARRAYS = {spec.name: spec for spec in contract.SAMPLER_INPUTS if len(spec.dims) == 3}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a trajectory: `index` of `total` steps are done and the flow time `t` is reached.

    `latents` [B, L, 64] are there in previews and in the last step. `path` says how each velocity is evaluated, see
    contract.PATHS. `batch` counts the samples that shared the step's last evaluation, those of other requests included.
    `request_id` is that of the request, by which the server logs it.
    `evaluated` counts the request's samples whose velocity was evaluated at this step; that of the others was forecast, which
    happens only with a tolerance. It is 0 for a step of size 0, such as flow_match's last. The last step has
    `network_evaluations`, how many evaluations each sample took, and the `forecast_error` of each: the mean over all steps of the
    relative error of the velocities. A server older than these outputs gives None.
    """

    index: int
    total: int
    t: float
    latents: npt.NDArray[np.float32] | None
    path: str
    batch: int
    request_id: str = ""
    evaluated: int | None = None
    network_evaluations: tuple[int, ...] | None = None
    forecast_error: tuple[float, ...] | None = None


def denoise(
    latents: Any, t: Scalars, context: Any, *, guidance: Scalars | None, guidance_scale: Scalars | None
) -> tuple[str, dict[str, Array]]:
    """The name of the denoiser to ask, and its inputs for any B."""
    if guidance is not None and guidance_scale is not None:
        raise invalid("guidance_scale", "None beside guidance", guidance_scale, "a model takes one of the two")
    axes: dict[str, int] = {}
    inputs = {
        "latents": _tensor(contract.LATENTS, latents, axes),
        "context": _tensor(contract.CONTEXT, context, axes),
        "t": _per_sample("t", t, axes["B"]),
    }
    if not ((inputs["t"] >= 0) & (inputs["t"] <= 1)).all():
        raise invalid("t", "in [0, 1]", t, "0 is noise, 1 is data; divide a 0..1000 timestep by 1000")
    if guidance is not None:
        inputs["guidance"] = _per_sample("guidance", guidance, axes["B"])
    if guidance_scale is not None:
        inputs["guidance_scale"] = _per_sample("guidance_scale", guidance_scale, axes["B"])
    return contract.DIT if guidance_scale is None else contract.DIT_GUIDED, inputs


def sample(context: Any, options: Mapping[str, Any]) -> dict[str, Array]:
    """The sampler's inputs for any B. An option that is None is not sent, so the deployed preset's default holds."""
    return cast(checked_sample(context, options))


def checked_sample(context: Any, options: Mapping[str, Any]) -> dict[str, Array]:
    """The sampler's inputs, checked but for their values, and not yet cast. Quick for arrays of any size."""
    given = {"context": context, **{name: value for name, value in options.items() if value is not None}}
    schedule = given.get("schedule", "flow_match")
    if not isinstance(schedule, str) or schedule not in contract.SCHEDULES:
        raise invalid("schedule", " or ".join(contract.SCHEDULES), repr(schedule), "leave it out for the deployed preset's own")
    if "latents" in given and ("num_latents" in given or not np.array_equal(given.pop("seed", 0), 0)):
        raise invalid("num_latents and seed", "left out beside latents", "one of them", "they describe the noise to draw")
    ranges = {**_RANGES, "steps": (1, contract.SCHEDULES[schedule])}
    axes: dict[str, int] = {}
    inputs: dict[str, Array] = {}
    for spec in contract.SAMPLER_INPUTS:  # the context comes first and fixes B and T for the other inputs
        if spec.name not in given:
            continue
        value = given[spec.name]
        if len(spec.dims) == 3:
            inputs[spec.name] = _shaped(spec, value, axes)
        elif spec.dtype == "BYTES":
            inputs[spec.name] = np.array([value.encode()], np.object_)
        elif spec.name == "tolerance":
            inputs[spec.name] = _tolerance(value)
        elif spec.dtype == "FP32":
            inputs[spec.name] = _per_sample(spec.name, value, 1)
        elif spec.name == "seed":
            inputs[spec.name] = _seeds(value, axes["B"])
        else:
            inputs[spec.name] = np.array([_integer(spec.name, value, *ranges[spec.name])], spec.numpy_dtype)
    return inputs


def decode(latents: Any, options: Mapping[str, Any]) -> dict[str, Array]:
    """The mesh model's inputs for latents [1, L, 64]. An option that is None is not sent, so the server's default holds."""
    return cast(checked_decode(latents, options))


def checked_decode(latents: Any, options: Mapping[str, Any]) -> dict[str, Array]:
    """The mesh model's inputs, checked but for the latents' values, and not yet cast. Quick for arrays of any size."""
    inputs = {contract.LATENTS.name: _shaped(contract.LATENTS, latents, {})}
    shapes = len(inputs[contract.LATENTS.name])
    if shapes != 1:
        hint = "decode each shape alone: [client.decode(each) for each in latents]"
        raise invalid("latents", f"of one shape, [1, L, {contract.LATENT_CHANNELS}]", f"{shapes} shapes", hint)
    return inputs | check_meshing(options)


def check_meshing(options: Mapping[str, Any]) -> dict[str, Array]:
    """The mesh model's inputs for the options among `options` that are its own. Raises InvalidInput."""
    inputs: dict[str, Array] = {}
    for spec in contract.MESH_OPTIONS:
        if (value := options.get(spec.name)) is None:
            continue
        if spec.dtype == "BYTES":
            if value not in _CHOICES[spec.name]:
                raise invalid(spec.name, " or ".join(_CHOICES[spec.name]), repr(value), "leave it out for the server's default")
            inputs[spec.name] = np.array([value.encode()], np.object_)
        elif spec.dtype == "FP32":
            inputs[spec.name] = _per_sample(spec.name, value, 1)
        else:
            inputs[spec.name] = np.array([_integer(spec.name, value, *_RANGES[spec.name])], spec.numpy_dtype)
    return inputs


def checked_options(options: Mapping[str, Any]) -> dict[str, Array]:
    """The sampler's inputs for one sample but for its context, so that wrong options are refused before a picture is encoded."""
    stand_in = np.zeros((1, contract.AXES["T"].min, contract.CONTEXT_WIDTH), np.float16)
    return checked_sample(stand_in, options)


def cast(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Checked inputs in the contract's dtypes. Raises InvalidInput for values that are not finite, or too large for the dtype."""
    return {name: _cast(_ARRAYS[name], array) if name in _ARRAYS else array for name, array in inputs.items()}


def noise(seed: int | Sequence[int], num_latents: int, *, batch: int = 1) -> npt.NDArray[np.float32]:
    """The initial noise [B, num_latents, 64] that the server draws for `seed` (sample i: seed + i) or B seeds.

    Row i is standard normal from numpy's Philox generator with its 64-bit seed as the key; it depends on nothing else.
    Raises InvalidInput for a seed or size outside the contract's.
    """
    length = _integer("num_latents", num_latents, *_RANGES["num_latents"])
    seeds = _seeds(seed, batch)
    if len(seeds) != batch:
        seeds = seeds[0] + np.arange(batch)
    rows = [
        np.random.Generator(np.random.Philox(key=int(each))).standard_normal((length, contract.LATENT_CHANNELS), np.float32)
        for each in seeds
    ]
    return np.stack(rows)


def conform(inputs: Tensors, model: ModelInfo) -> dict[str, Array]:
    """The inputs in the shapes that the server declares ([B] travels as [B, 1]), checked against its declaration.

    Raises InvalidInput for an input too many or too few, ModelNotReady for a model of another contract.
    """
    for name in inputs.keys() - model.inputs.keys():
        hint = f"it takes {', '.join(model.inputs)}; guidance is for distilled weights, guidance_scale for the others"
        raise invalid(name, f"left out for {model.name} on this server", "a value", hint)
    conformed = {}
    for name, declared in model.inputs.items():
        if name not in inputs:
            if declared.optional:
                continue
            raise invalid(
                name, f"given for {model.name} on this server", "None", f"pass {name}= (distilled weights want guidance)"
            )
        array = inputs[name]
        array = array.reshape(array.shape + (1,) * (len(declared.shape) - array.ndim))
        fits = len(declared.shape) == array.ndim and all(d in (-1, s) for d, s in zip(declared.shape, array.shape, strict=True))
        if not fits or contract.NUMPY_DTYPES.get(declared.dtype) is not array.dtype.type:
            wanted = f"{declared.dtype} {list(declared.shape)}"
            raise ModelNotReady(
                f"{name} of {model.name} must be {_found(array)} on the server, got {wanted}\n"
                "hint: the deployed model is of another contract; redeploy it with this version's hunyuan3d-export deploy",
                model=model.name,
            )
        conformed[name] = array
    return conformed


def velocity(answer: Tensors, like: Array) -> Array:
    """The velocity of a denoiser's answer. Raises ModelFailed if it isn't float32 in the latents' shape."""
    found = answer.get("velocity")
    if found is None or found.dtype != np.float32 or found.shape != like.shape:
        got = "nothing" if found is None else _found(found)
        raise ModelFailed(f"velocity must be {_found(like)}, got {got}\nhint: redeploy the model")
    return found


def context(answer: Tensors) -> Array:
    """The condition tokens of an image encoder's answer. Raises ModelFailed if they aren't float16 [1, T, 1536]."""
    found = answer.get("context")
    if found is None or found.dtype != np.float16 or found.ndim != 3 or found.shape[::2] != (1, contract.CONTEXT_WIDTH):
        got = "nothing" if found is None else _found(found)
        raise ModelFailed(f"context must be float16 [1, T, {contract.CONTEXT_WIDTH}], got {got}\nhint: redeploy the model")
    return found


def picture_facts(answer: Tensors) -> dict[str, list[Any]]:
    """What became of each view's background, and the part that is subject; nothing of a server that does not tell."""
    if any(spec.name not in answer for spec in contract.PICTURE_FACTS):
        return {}
    shares = [round(float(share), 4) for share in answer["subject_share"]]
    return {"background": [text.decode() for text in answer["background"]], "subject_share": shares}


def cutout(answer: Tensors) -> Cutout:
    """The Cutout of preprocessing's answer. Raises ModelFailed if an output is missing, ModelNotReady without a remover."""
    facts = picture_facts(answer)
    if not facts or contract.CUTOUT.name not in answer:
        raise ModelFailed(f"{contract.PREPROCESS} must answer with a cutout, got {sorted(answer)}\nhint: redeploy it")
    (background,), (share,) = facts["background"], facts["subject_share"]
    if background == contract.NO_REMOVER:
        raise ModelNotReady(
            f"{contract.BACKGROUND} must be ready on the server for cutout(), got no such model\n"
            "hint: hunyuan3d-export background --out build/background, then hunyuan3d-export deploy --artifacts build/background",
            model=contract.BACKGROUND,
        )
    return Cutout(bytes(answer[contract.CUTOUT.name][0]), background, share)


# What cutout() asks preprocessing for. The pixels for the image encoder would only cost time.
CUTOUT_OUTPUTS = (*(spec.name for spec in contract.PICTURE_FACTS), contract.CUTOUT.name)


def step(answer: Tensors, *, request_id: str = "") -> Step:
    """The Step of one response of the sampler. Raises ModelFailed if an output is missing."""
    missing = [spec.name for spec in contract.SAMPLER_OUTPUTS if not spec.optional and spec.name not in answer]
    if missing:
        raise ModelFailed(f"each response of {contract.SAMPLER} must carry {missing}, got {sorted(answer)}\nhint: redeploy it")
    latents = answer["latents"].copy() if "latents" in answer else None
    index, total, t, batch = (answer[name][0] for name in ("step", "total", "t", "batch"))
    forecasts = {name: tuple(answer[name].tolist()) for name in ("network_evaluations", "forecast_error") if name in answer}
    evaluated = int(answer["evaluated"][0]) if "evaluated" in answer else None
    path = answer["path"][0].decode()
    return Step(int(index), int(total), float(t), latents, path, int(batch), request_id, evaluated, **forecasts)


def _tolerance(value: Any) -> Array:
    tolerance = _per_sample("tolerance", value, 1)
    if not 0 <= tolerance[0] < 1:
        raise invalid("tolerance", "in [0, 1)", value, "it is a relative error; 0 evaluates every step")
    return tolerance


def mesh(answer: Tensors) -> MeshProgress | Mesh:
    """The Mesh of the mesh model's final response, or the progress of an earlier one. Raises ModelFailed if an output is missing."""
    wanted = contract.MESH_RESULT if "mesh" in answer else contract.MESH_PROGRESS
    missing = [spec.name for spec in wanted if spec.name not in answer]
    if missing:
        raise ModelFailed(f"this response of {contract.MESH} must carry {missing}, got {sorted(answer)}\nhint: redeploy it")
    if "mesh" not in answer:
        level, levels, evaluations = (int(answer[name][0]) for name in ("refinement", "refinements", "evaluations"))
        return MeshProgress(answer["stage"][0].decode(), level, levels, evaluations)
    return Mesh(answer["mesh"].tobytes(), answer["mesh_format"][0].decode(), json.loads(answer["statistics"][0]))


def _found(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _array(name: str, value: Any) -> Array:
    """Whatever NumPy can read, as an array. Arrays of torch and cupy are copied to the host without importing either."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
        elif hasattr(value, "__cuda_array_interface__"):
            value = value.get()
        return np.asarray(value)
    except Exception as error:
        hint = "pass float16 or float32; tensors of other types (bfloat16) need .float() first"
        raise invalid(name, "an array", f"{type(value).__name__} ({error})", hint) from error


def _tensor(spec: contract.TensorSpec, value: Any, axes: dict[str, int]) -> Array:
    return _cast(spec, _shaped(spec, value, axes))


def _shaped(spec: contract.TensorSpec, value: Any, axes: dict[str, int]) -> Array:
    """`value` as an array of floats with a batch axis; a value without that axis gets B = 1.

    `axes` remembers the size of each free axis, and a later tensor of another size is refused.
    """
    array = _array(spec.name, value)
    if array.ndim == len(spec.dims) - 1:
        array = array[np.newaxis]
    expected = "float [" + ", ".join(map(str, spec.dims)) + "]"
    if array.dtype.kind != "f" or array.ndim != len(spec.dims):
        raise invalid(spec.name, expected, _found(array), f"{spec.meaning}; cast with .astype({spec.numpy_dtype.__name__!r})")
    for dim, size in zip(spec.dims, array.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise invalid(spec.name, expected, _found(array), f"the last axis is always {dim} wide")
            continue
        low, high = contract.AXES[dim].min, contract.AXES[dim].max
        if dim == "B":  # any size: the client splits a denoiser's batch, and the sampler steps a large batch in parts
            high = max(size, low)
        if not low <= size <= high:
            raise invalid(
                spec.name, f"{expected} with {dim} from {low} to {high}", _found(array), "the ranges are contract.AXES"
            )
        if axes.setdefault(dim, size) != size:
            raise invalid(spec.name, f"{expected} with {dim} = {axes[dim]}", _found(array), f"all inputs share {dim}")
    return array


def _cast(spec: contract.TensorSpec, array: Array) -> Array:
    """An array in the contract's dtype. Raises InvalidInput for values that are not finite there."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=spec.numpy_dtype)
    if not _finite(cast):
        if np.isfinite(array).all():
            name, limit = cast.dtype.name, float(np.finfo(cast.dtype.name).max)
            worst = f"magnitude {np.abs(array).max():.6g}"
            raise invalid(spec.name, f"within {name}'s range of {limit:.6g}", worst, "scale it down; it travels as " + name)
        raise invalid(spec.name, "finite", "NaN or infinity", "check what made it")
    return cast


def _finite(array: Array) -> bool:
    """Whether all elements are finite.

    float16 is checked by its bits, because np.isfinite takes 10 ms for one context of v2-0 in that dtype.
    """
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    return bool(array.view(np.int16).max() < 0x7C00 and array.view(np.uint16).max() < 0xFC00)


def _per_sample(name: str, value: Any, batch: int) -> Array:
    array = _array(name, value)
    if array.dtype.kind not in "fiu" or array.shape not in ((), (1,), (batch,)):
        raise invalid(name, f"a number or [{batch}] numbers", _found(array), "one for all samples, or one for each")
    with np.errstate(over="ignore"):
        cast = np.broadcast_to(array, (batch,)).astype(np.float32)
    if not np.isfinite(cast).all():
        raise invalid(name, "finite in float32", value, "check what made it")
    return cast


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise invalid(name, f"an integer from {low} to {high}", repr(value), "leave it out for the deployed preset's default")
    return number


def _seeds(seed: Any, batch: int) -> Array:
    seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) and np.ndim(seed) else [seed]
    if len(seeds) not in (1, batch):
        raise invalid("seed", f"one integer or {batch}", f"{len(seeds)} of them", "with one seed, sample i uses seed + i")
    return np.array([_integer("seed", each, 0, np.iinfo(np.int64).max - batch) for each in seeds], np.int64)
