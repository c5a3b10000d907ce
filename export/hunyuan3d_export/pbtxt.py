"""Renders config.pbtxt files from the contract: one function for each runtime that can serve a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract

from .files import CHECKPOINT_FILE, ONNX_FILE, PLAN_FILE, RTX_PLAN_FILE, atomic_path

_HEADER = "# Rendered from the contract by python -m hunyuan3d_export.networks; a test compares this file with it.\n"
MAX_BATCH = contract.AXES["B"].max
# How long a request waits for others to share its batch. Triton takes max_batch_size for the preferred size where a config names
# none, so with a delay every smaller batch would wait its full length, at each step of a sample. Without one, requests that arrive
# while an evaluation runs still share the next.
_QUEUE_DELAY_US = 0
# The GPUs on which Triton makes instances of a plan. Without this list it makes an instance on every GPU that it sees.
_GPUS = (0,)
_QUEUE_TIMEOUT_US = 60_000_000
_MAX_QUEUE = 64
# The size of each free axis in the warm-up evaluation on a CPU. Small sizes are enough there, because the evaluation only has
# to page the weights in. On a GPU the warm-up runs at the profile's usual sizes, like the first real call after it.
_CPU_WARMUP = 64


def read_config(folder: Path, config_name: str) -> pb.ModelConfig:
    """The config Triton would use for a model folder under `--model-config-name config_name`.

    Raises ValueError when it is not a model config.
    """
    path = folder / "configs" / f"{config_name}.pbtxt"
    path = path if path.is_file() else folder / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(), pb.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(f"{path} must be a Triton model config, got: {error}") from error


def artifact_file(config: pb.ModelConfig) -> str | None:
    """The file in a version folder that this config serves; None for a model that consists of code alone."""
    if "model_file" in config.parameters:
        return str(config.parameters["model_file"].string_value)
    return config.default_model_filename or None


def config_text(config: pb.ModelConfig) -> str:
    """The text of a config file, under a line that says what rendered it."""
    return _HEADER + text_format.MessageToString(config)


def triton_type(dtype: str) -> int:
    """The number that Triton gives the dtype of this name."""
    return int(pb.DataType.Value("TYPE_STRING" if dtype == "BYTES" else f"TYPE_{dtype}"))


def dims_of(spec: contract.TensorSpec) -> list[int]:
    """The dims of a tensor as Triton writes them, with -1 for a free axis."""
    return [-1 if isinstance(dim, str) else dim for dim in spec.dims]


def _batched_input(spec: contract.TensorSpec) -> pb.ModelInput:
    """An input without its batch axis, which Triton adds. A [B] tensor is declared as [B, 1] and reshaped to [B]."""
    dims = dims_of(spec)[1:]
    if dims:
        return pb.ModelInput(name=spec.name, data_type=triton_type(spec.dtype), dims=dims)
    return pb.ModelInput(name=spec.name, data_type=triton_type(spec.dtype), dims=[1], reshape=pb.ModelTensorReshape())


def _batched(
    spec: contract.ModelSpec, *, device: str, profile: Mapping[str, contract.AxisRange] | None = None
) -> pb.ModelConfig:
    """The part of a config that all runtimes share where Triton batches requests.

    profile: the ranges of a plan, which bound the batch and whose usual sizes the warm-up has. Without it the warm-up is small.
    """
    return pb.ModelConfig(
        name=spec.name,
        max_batch_size=profile["B"].max if profile else MAX_BATCH,
        input=[_batched_input(tensor) for tensor in spec.inputs],
        output=[
            pb.ModelOutput(name=tensor.name, data_type=triton_type(tensor.dtype), dims=dims_of(tensor)[1:])
            for tensor in spec.outputs
        ],
        instance_group=[_instance_group(device)],
        dynamic_batching=_bounded_queue(_MAX_QUEUE),
        model_warmup=[_warmup(spec, profile)],
    )


def _bounded_queue(most: int) -> pb.ModelDynamicBatching:
    """A queue that refuses requests beyond `most`, and those that have waited too long. Only this part of a config can bound it."""
    policy = pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=_QUEUE_TIMEOUT_US,
        allow_timeout_override=True,
        max_queue_size=most,
    )
    return pb.ModelDynamicBatching(max_queue_delay_microseconds=_QUEUE_DELAY_US, default_queue_policy=policy)


def _instance_group(device: str) -> pb.ModelInstanceGroup:
    """One instance. Only KIND_GPU may name GPUs: KIND_AUTO becomes KIND_CPU on a machine without a GPU, and Triton refuses a
    KIND_CPU that names any.
    """
    return pb.ModelInstanceGroup(
        count=1, kind=pb.ModelInstanceGroup.Kind.Value(device), gpus=_GPUS if device == "KIND_GPU" else ()
    )


def instances(config: pb.ModelConfig) -> int:
    """How many instances of a model evaluate at the same time: in each group `count` on each of its GPUs."""
    return sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)


def _warmup(spec: contract.ModelSpec, profile: Mapping[str, contract.AxisRange] | None) -> pb.ModelWarmup:
    warmup = pb.ModelWarmup(name="one evaluation", batch_size=1)
    for tensor in spec.inputs:
        dims = [_warmup_size(dim, profile) for dim in tensor.dims[1:]] or [1]
        data = warmup.inputs[tensor.name]
        data.data_type, data.zero_data = triton_type(tensor.dtype), True
        data.dims.extend(dims)
    return warmup


def _warmup_size(dim: str | int, profile: Mapping[str, contract.AxisRange] | None) -> int:
    if isinstance(dim, int):
        return dim
    return profile[dim].opt if profile else min(_CPU_WARMUP, contract.AXES[dim].opt)


def tensorrt(spec: contract.ModelSpec, profile: Mapping[str, contract.AxisRange] | None = None) -> pb.ModelConfig:
    """A plan in Triton's TensorRT backend. profile: the ranges of the plan's axes, where they differ from the contract's."""
    config = _batched(spec, device="KIND_GPU", profile={**contract.AXES, **(profile or {})})
    config.platform, config.backend, config.default_model_filename = "tensorrt_plan", "tensorrt", PLAN_FILE
    return config


def native_onnxruntime(spec: contract.ModelSpec) -> pb.ModelConfig:
    """A graph in Triton's own ONNX Runtime backend."""
    config = _batched(spec, device="KIND_AUTO")
    config.backend, config.default_model_filename = "onnxruntime", ONNX_FILE
    return config


def python_onnxruntime(spec: contract.ModelSpec) -> pb.ModelConfig:
    """A graph on ONNX Runtime's CPU kernels, in the Python backend."""
    config = _batched(spec, device="KIND_CPU")
    config.backend = "python"
    set_parameters(config, {"runtime": "onnxruntime", "model_file": ONNX_FILE, "threads": "0", "limits": _limits(spec)})
    return config


def python_torch(spec: contract.ModelSpec, parameters: Mapping[str, str], *, holder: str) -> pb.ModelConfig:
    """The torch network in the Python backend. holder: the model whose folder holds the checkpoint that all models read."""
    config = _batched(spec, device="KIND_AUTO")
    config.backend = "python"
    folder = "" if spec.name == holder else f"../../{holder}/1/"
    own = {"runtime": "torch", "model_file": folder + CHECKPOINT_FILE, "limits": _limits(spec)}
    # The last parameter is Triton's own: with it, an input on a GPU stays there. Only code that takes inputs from any device may
    # have it, as torch does by DLPack; NumPy would fail.
    set_parameters(config, {**own, **parameters, "FORCE_CPU_ONLY_INPUT_TENSORS": "no"})
    return config


def python_rtx(spec: contract.ModelSpec, profile: Mapping[str, contract.AxisRange] | None = None) -> pb.ModelConfig:
    """A plan of TensorRT for RTX on the first GPU, in the Python backend. profile: as for `tensorrt`."""
    # KIND_CPU, because the runtime itself takes the GPU that `device` names: Triton need not see a GPU, as in the embedded
    # server, and must not make an instance for each GPU that it sees.
    config = _batched(spec, device="KIND_CPU", profile={**contract.AXES, **(profile or {})})
    config.backend = "python"
    set_parameters(config, {"runtime": "tensorrt_rtx", "model_file": RTX_PLAN_FILE, "device": "0", "limits": _limits(spec)})
    return config


def _limits(spec: contract.ModelSpec) -> str:
    """Ranges of values and axis sizes; the Python backend refuses other inputs. An axis is named by its index, with B as 0."""
    limits = [f"{tensor.name} in {tensor.values[0]}..{tensor.values[1]}" for tensor in spec.inputs if tensor.values]
    for tensor in spec.inputs:
        for place, dim in enumerate(tensor.dims):
            if dim in contract.BOUNDED_AXES:
                size, counted = contract.AXES[str(dim)], contract.AXIS_NAMES[str(dim)]
                limits.append(f"{tensor.name}[{place}] in {size.min}..{size.max} {counted}")
    return "; ".join(limits)


def set_parameters(config: pb.ModelConfig, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        config.parameters[key].string_value = value


def code_model(
    spec: contract.ModelSpec,
    *,
    decoupled: bool = False,
    parameters: Mapping[str, str] | None = None,
    instances: int = 1,
    most_queued: int | None = None,
) -> pb.ModelConfig:
    """A Python model that handles the batch axis itself. Its max_batch_size is 0, so its dims contain the batch axis.

    most_queued: how many requests may wait; None for a model that refuses by itself.
    """
    config = pb.ModelConfig(
        name=spec.name,
        backend="python",
        max_batch_size=0,
        input=[
            pb.ModelInput(name=tensor.name, data_type=triton_type(tensor.dtype), dims=dims_of(tensor), optional=tensor.optional)
            for tensor in spec.inputs
        ],
        output=[
            pb.ModelOutput(name=tensor.name, data_type=triton_type(tensor.dtype), dims=dims_of(tensor))
            for tensor in spec.outputs
        ],
        instance_group=[pb.ModelInstanceGroup(count=instances, kind=pb.ModelInstanceGroup.Kind.Value("KIND_CPU"))],
        dynamic_batching=None if most_queued is None else _bounded_queue(most_queued),
    )
    if decoupled:
        config.model_transaction_policy.decoupled = True
    # Triton ignores `needs`. server/loadable.py reads it to choose the models that the server loads.
    needs = {"needs": " ".join("|".join(group) for group in spec.needs)} if spec.needs else {}
    set_parameters(config, {**(parameters or {}), **needs})
    return config


def ensemble(spec: contract.ModelSpec, models: Mapping[str, contract.ModelSpec]) -> pb.ModelConfig:
    """An ensemble of the steps that `spec` names. It connects the tensors of its models that have equal names."""
    config = code_model(spec)
    config.ClearField("backend")
    config.ClearField("instance_group")
    config.platform = "ensemble"
    steps = [models[name] for name in spec.steps]
    known = {tensor.name for tensor in spec.inputs}
    for place, step in enumerate(steps):
        later = {tensor.name for other in steps[place + 1 :] for tensor in other.inputs}
        wanted = later | {tensor.name for tensor in spec.outputs}
        inputs = [tensor.name for tensor in step.inputs if tensor.name in known]
        outputs = [tensor.name for tensor in step.outputs if tensor.name in wanted]
        scheduled = config.ensemble_scheduling.step.add(model_name=step.name, model_version=-1)
        scheduled.input_map.update({name: name for name in inputs})
        scheduled.output_map.update({name: name for name in outputs})
        known |= set(outputs)
    return config


def same_but_for_warmup(first: str, second: str) -> bool:
    """Whether two config texts say the same, apart from the sizes of the warm-up."""
    configs = [text_format.Parse(text, pb.ModelConfig()) for text in (first, second)]
    for config in configs:
        config.ClearField("model_warmup")
    return bool(configs[0] == configs[1])


def write_configs(repository: Path, files: Mapping[str, str]) -> None:
    """Writes rendered configs. files: path inside the repository -> text."""
    for name, text in files.items():
        with atomic_path(repository / name) as temporary:
            temporary.write_text(text)
