"""The config.pbtxt files of the denoisers, for every runtime, and of the samplers that call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract

from ..attention import BACKENDS
from ..pbtxt import (
    MAX_BATCH,
    code_model,
    config_text,
    instances,
    native_onnxruntime,
    python_onnxruntime,
    python_rtx,
    python_torch,
    tensorrt,
)
from .config import GUIDED_FORMS, Preset
from .sizes import MAX_TOKENS, plan_profile

_MAX_TRAJECTORIES = 64
# Name -> (default, pattern of allowed values). The torch runtime in model_repository/ explains each parameter.
_TORCH_PARAMETERS = {
    "device": ("auto", r"auto|cpu|cuda|cuda:\d+"),
    "dtype": ("auto", "auto|fp32|fp16|bf16"),
    "attention_backend": ("auto", "|".join(["auto", *BACKENDS])),
    "guided_form": ("auto", "|".join(["auto", *GUIDED_FORMS])),
    "compile": ("false", "true|false"),
    "cuda_graphs": ("false", "true|false"),
    "threads": ("0", r"\d+"),
}
# Config file -> the sampler's parameters that depend on the denoiser's runtime, besides `lanes`, which follows from the
# denoiser's config. A plan runs inside the server, so there is no denoiser process that could die and need a restart.
_SAMPLER_RUNTIMES = {
    "config.pbtxt": {"restart_denoiser": "false"},
    "configs/cpu.pbtxt": {"restart_denoiser": "true"},
    "configs/rtx.pbtxt": {"restart_denoiser": "true"},
    "configs/torch.pbtxt": {"restart_denoiser": "true"},
}


_OF_PLANS = ("config.pbtxt", "configs/rtx.pbtxt")


def torch_parameters(texts: Iterable[str] = ()) -> dict[str, str]:
    """The torch runtime's parameters: the defaults, except for those that `texts` set. Each text looks like dtype=fp16.

    Raises ValueError for an unknown name or a value that the runtime would refuse.
    """
    values = {name: default for name, (default, _) in _TORCH_PARAMETERS.items()}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in values:
            raise ValueError(f"torch option must be one of {', '.join(values)}, got {name!r}\nhint: --torch dtype=fp16")
        if not re.fullmatch(_TORCH_PARAMETERS[name][1], value):
            raise ValueError(f"torch option {name} must be {_TORCH_PARAMETERS[name][1]}, got {value!r}")
        values[name] = value
    guided_form = values.pop("guided_form")
    return {**values, "choices": f"guided_form={guided_form}"}  # the denoiser's own; the runtime takes those of any network


def config_files(preset: Preset, torch: Mapping[str, str] | None = None) -> dict[str, str]:
    """Path inside the repository -> text, for the denoisers of `preset` and the samplers."""
    files = {}
    profile = plan_profile(preset)
    for graph, spec in preset.specs.items():
        files[f"{spec.name}/config.pbtxt"] = tensorrt(spec, profile)
        files[f"{spec.name}/configs/cpu.pbtxt"] = python_onnxruntime(spec)
        files[f"{spec.name}/configs/onnxruntime.pbtxt"] = native_onnxruntime(spec)
        files[f"{spec.name}/configs/rtx.pbtxt"] = python_rtx(spec, profile)
        served = {"network": "dit", "graph": graph, **(torch or torch_parameters())}
        files[f"{spec.name}/configs/torch.pbtxt"] = python_torch(spec, served, holder=contract.DIT)
    for name, runtime in _SAMPLER_RUNTIMES.items():
        # A plan takes only as many rows as its profile.
        max_batch = profile["B"].max if name in _OF_PLANS else MAX_BATCH
        lanes = instances(files[f"{contract.DIT}/{name}"])
        files[f"{contract.SAMPLER}/{name}"] = _sampler(preset, {"lanes": str(lanes), **runtime}, max_batch=max_batch)
    files[f"{contract.SAMPLER_UNARY}/config.pbtxt"] = code_model(contract.MODELS[contract.SAMPLER_UNARY])
    return {name: config_text(config) for name, config in files.items()}


def _sampler(preset: Preset, runtime: Mapping[str, str], *, max_batch: int) -> pb.ModelConfig:
    parameters = {
        "steps": str(preset.steps),
        "guidance_scale": f"{preset.guidance_scale:g}",
        "schedule": preset.schedule,
        "guidance_embed": str(preset.config.guidance_embed).lower(),
        "max_batch": str(max_batch),
        "max_tokens_per_step": str(MAX_TOKENS),
        "max_trajectories": str(_MAX_TRAJECTORIES),
        "max_queued": str(_MAX_TRAJECTORIES),
        "largest_request": str(MAX_BATCH),
        "preview_mib": "512",
        "queue_timeout_s": "600",
        "total_timeout_s": "14400",  # 50 steps of v2-0 on a laptop's CPU take hours
        "evaluation_timeout_s": "1800",
        "arrays": "numpy",  # on GPUs too, until a GPU has shown that CuPy is faster
        **runtime,
    }
    return code_model(contract.MODELS[contract.SAMPLER], decoupled=True, parameters=parameters)
