"""Every config.pbtxt, rendered from the contract and a preset's sampling defaults.

The files in git are those of `v2-0`; `python -m hunyuan3d_export.configs` writes them again after a change here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract

from .dit import PRESETS, Preset
from .dit.attention import BACKENDS
from .files import ONNX_FILE, PLAN_FILE

CHECKPOINT_FILE = "checkpoint.safetensors"
_HEADER = "# Rendered by hunyuan3d_export/configs.py from the contract table; a test holds this file against it.\n"
_MAX_BATCH = contract.AXES["B"].max
# Requests that come together merge; one that comes alone waits little: every step of a single sample does.
_QUEUE_DELAY_US = 500
_QUEUE_TIMEOUT_US = 60_000_000
_MAX_QUEUE = 64
# A CPU's warm-up only pages the weights in; a GPU's runs at the profile's opt sizes, where the first real call will be.
_CPU_WARMUP = {"L": 64, "T": 64}
_GPU_WARMUP = {name: contract.AXES[name].opt for name in ("L", "T")}
_MAX_TRAJECTORIES = 64
# Name -> default and what else it may be; hunyuan3d_dit/1/torch_denoiser.py says what each means.
_TORCH_PARAMETERS = {
    "device": ("auto", r"auto|cpu|cuda|cuda:\d+"),
    "dtype": ("auto", "auto|fp32|fp16|bf16"),
    "attention_backend": ("auto", "|".join(["auto", *BACKENDS])),
    "compile": ("false", "true|false"),
    "cuda_graphs": ("false", "true|false"),
    "threads": ("0", r"\d+"),
}
# A full batch at the usual sizes; longer sequences get fewer rows a call, which keeps a step's latency.
_MAX_TOKENS = _MAX_BATCH * (contract.AXES["L"].opt + contract.AXES["T"].opt)
# The sampler's parameters that depend on the denoiser's runtime; a plan has no process of its own to lose.
_SAMPLER_RUNTIMES = {
    "config.pbtxt": {"arrays": "auto", "restart_denoiser": "false"},
    "configs/cpu.pbtxt": {"arrays": "numpy", "restart_denoiser": "true"},
    "configs/torch.pbtxt": {"arrays": "auto", "restart_denoiser": "true"},
}


def plan_sizes(preset: Preset) -> dict[str, tuple[int, ...]]:
    """The sizes of B, L and T that these configs send to a plan by themselves: batches, the warm-up, the preset's defaults."""
    return {
        "B": (1, _MAX_BATCH),
        "L": (preset.num_latents, _GPU_WARMUP["L"]),
        "T": (preset.context_tokens, _GPU_WARMUP["T"]),
    }


def torch_parameters(texts: Iterable[str] = ()) -> dict[str, str]:
    """The torch runtime's parameters: the defaults with those of `texts`, each like dtype=fp16, in their place.

    Raises ValueError for an unknown name or a value the runtime would refuse.
    """
    values = {name: default for name, (default, _) in _TORCH_PARAMETERS.items()}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in values:
            raise ValueError(f"torch option must be one of {', '.join(values)}, got {name!r}\nhint: --torch dtype=fp16")
        if not re.fullmatch(_TORCH_PARAMETERS[name][1], value):
            raise ValueError(f"torch option {name} must be {_TORCH_PARAMETERS[name][1]}, got {value!r}")
        values[name] = value
    return values


def config_files(preset: Preset, torch: Mapping[str, str] | None = None) -> dict[str, str]:
    """Path inside the repository -> text, for every model that `preset` is served by."""
    distilled = preset.config.guidance_embed
    specs = [contract.denoiser(guidance_embed=distilled)] + ([] if distilled else [contract.denoiser(guided=True)])
    files = {}
    for spec in specs:
        files[f"{spec.name}/config.pbtxt"] = config_text(tensorrt(spec))
        files[f"{spec.name}/configs/cpu.pbtxt"] = config_text(python_onnxruntime(spec))
        files[f"{spec.name}/configs/onnxruntime.pbtxt"] = config_text(native_onnxruntime(spec))
        files[f"{spec.name}/configs/torch.pbtxt"] = config_text(_python_torch(spec, torch or torch_parameters()))
    for name, runtime in _SAMPLER_RUNTIMES.items():
        files[f"{contract.SAMPLER}/{name}"] = config_text(_sampler(preset, runtime))
    files[f"{contract.SAMPLER_UNARY}/config.pbtxt"] = config_text(_sampler_unary())
    return files


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
    """The file in a version folder that this config serves; None for a model that is code alone."""
    if "model_file" in config.parameters:
        return str(config.parameters["model_file"].string_value)
    return config.default_model_filename or None


def config_text(config: pb.ModelConfig) -> str:
    """The file, with its first line."""
    return _HEADER + text_format.MessageToString(config)


def triton_type(dtype: str) -> int:
    """Triton's number of a dtype's name."""
    return int(pb.DataType.Value("TYPE_STRING" if dtype == "BYTES" else f"TYPE_{dtype}"))


def dims_of(spec: contract.TensorSpec) -> list[int]:
    """Triton's dims: -1 for a free axis."""
    return [-1 if isinstance(dim, str) else dim for dim in spec.dims]


def _batched_input(spec: contract.TensorSpec) -> pb.ModelInput:
    """An input whose batch axis Triton adds by itself; a [B] tensor is [B, 1] to it, reshaped away."""
    dims = dims_of(spec)[1:]
    if dims:
        return pb.ModelInput(name=spec.name, data_type=triton_type(spec.dtype), dims=dims)
    return pb.ModelInput(name=spec.name, data_type=triton_type(spec.dtype), dims=[1], reshape=pb.ModelTensorReshape())


def _batched(spec: contract.ModelSpec, *, device: str, warmup: Mapping[str, int]) -> pb.ModelConfig:
    """What models that Triton batches have in common, whatever runs them."""
    policy = pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=_QUEUE_TIMEOUT_US,
        allow_timeout_override=True,
        max_queue_size=_MAX_QUEUE,
    )
    return pb.ModelConfig(
        name=spec.name,
        max_batch_size=_MAX_BATCH,
        input=[_batched_input(tensor) for tensor in spec.inputs],
        output=[
            pb.ModelOutput(name=tensor.name, data_type=triton_type(tensor.dtype), dims=dims_of(tensor)[1:])
            for tensor in spec.outputs
        ],
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.Kind.Value(device))],
        dynamic_batching=pb.ModelDynamicBatching(max_queue_delay_microseconds=_QUEUE_DELAY_US, default_queue_policy=policy),
        model_warmup=[_warmup(spec, warmup)],
    )


def _warmup(spec: contract.ModelSpec, sizes: Mapping[str, int]) -> pb.ModelWarmup:
    warmup = pb.ModelWarmup(name="one evaluation", batch_size=1)
    for tensor in spec.inputs:
        dims = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims[1:]] or [1]
        data = warmup.inputs[tensor.name]
        data.data_type, data.zero_data = triton_type(tensor.dtype), True
        data.dims.extend(dims)
    return warmup


def tensorrt(spec: contract.ModelSpec, warmup: Mapping[str, int] = _GPU_WARMUP) -> pb.ModelConfig:
    """A plan in Triton's TensorRT backend; warmup: the free axes' sizes in one evaluation at the start."""
    config = _batched(spec, device="KIND_GPU", warmup=warmup)
    config.platform, config.backend, config.default_model_filename = "tensorrt_plan", "tensorrt", PLAN_FILE
    return config


def native_onnxruntime(spec: contract.ModelSpec, warmup: Mapping[str, int] = _CPU_WARMUP) -> pb.ModelConfig:
    """A graph in Triton's own ONNX Runtime backend."""
    config = _batched(spec, device="KIND_AUTO", warmup=warmup)
    config.backend, config.default_model_filename = "onnxruntime", ONNX_FILE
    return config


def python_onnxruntime(spec: contract.ModelSpec, warmup: Mapping[str, int] = _CPU_WARMUP) -> pb.ModelConfig:
    """A graph on ONNX Runtime's CPU kernels, in the Python backend."""
    config = _batched(spec, device="KIND_CPU", warmup=warmup)
    config.backend = "python"
    set_parameters(config, {"runtime": "onnxruntime", "model_file": ONNX_FILE, "threads": "0"})
    return config


def _python_torch(spec: contract.ModelSpec, parameters: Mapping[str, str]) -> pb.ModelConfig:
    config = _batched(spec, device="KIND_AUTO", warmup=_CPU_WARMUP)
    config.backend = "python"
    # Both models read the one checkpoint.
    folder = "" if spec.name == contract.DIT else f"../../{contract.DIT}/1/"
    set_parameters(config, {"runtime": "torch", "model_file": folder + CHECKPOINT_FILE, **parameters})
    # Triton's own: a tensor that is on a GPU comes as it is.
    set_parameters(config, {"FORCE_CPU_ONLY_INPUT_TENSORS": "no"})
    return config


def set_parameters(config: pb.ModelConfig, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        config.parameters[key].string_value = value


def _sampler(preset: Preset, runtime: Mapping[str, str]) -> pb.ModelConfig:
    config = code_model(contract.MODELS[contract.SAMPLER])
    config.model_transaction_policy.decoupled = True
    parameters = {
        "steps": str(preset.steps),
        "guidance_scale": f"{preset.guidance_scale:g}",
        "schedule": preset.schedule,
        "guidance_embed": str(preset.config.guidance_embed).lower(),
        "max_batch": str(_MAX_BATCH),
        "max_tokens_per_step": str(_MAX_TOKENS),
        "max_trajectories": str(_MAX_TRAJECTORIES),
        "max_queued": str(_MAX_TRAJECTORIES),
        "lanes": "1",  # as many as the denoiser has instances
        "queue_timeout_s": "600",
        "total_timeout_s": "14400",  # 50 steps of v2-0 on a laptop's CPU take hours
        "evaluation_timeout_s": "1800",
        **runtime,
    }
    if runtime["arrays"] == "auto":
        parameters["FORCE_CPU_ONLY_INPUT_TENSORS"] = "no"  # the denoiser's velocities stay on the GPU
    set_parameters(config, parameters)
    return config


def _sampler_unary() -> pb.ModelConfig:
    return code_model(contract.MODELS[contract.SAMPLER_UNARY])


def code_model(spec: contract.ModelSpec) -> pb.ModelConfig:
    """A Python model whose batch axis is its own business (max_batch_size 0): every dim is spelled out."""
    return pb.ModelConfig(
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
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.Kind.Value("KIND_CPU"))],
    )


def write_configs(repository: Path, preset: Preset, more: Mapping[str, str] | None = None) -> None:
    """Writes every config of `preset`, and those of `more`, into `repository`."""
    for name, text in {**config_files(preset), **(more or {})}.items():
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    from .image_configs import image_config_files

    write_configs(Path(__file__).parent.parent.parent / "model_repository", PRESETS["v2-0"], image_config_files())
