"""The config.pbtxt files of the shape decoder's two models, for every runtime, and of the models that make meshes with them."""

from __future__ import annotations

from collections.abc import Mapping

from hunyuan3d_client import contract

from ..dit.configs import torch_parameters
from ..pbtxt import (
    MAX_BATCH,
    code_model,
    config_text,
    native_onnxruntime,
    python_onnxruntime,
    python_rtx,
    python_torch,
    tensorrt,
)
from .config import ShapeVAEPreset

# Config file -> the most calls of hunyuan3d_field that hunyuan3d_mesh has in flight. With two batches' worth, the next batch is
# full when one ends. ONNX Runtime on a CPU keeps all scores of attention, so there a batch holds half as many rows.
_FIELD_CALLS = {"config.pbtxt": 2 * MAX_BATCH, "configs/cpu.pbtxt": MAX_BATCH}
# 2^26: `dense` up to a resolution of 405, which takes 0.5 GB, and many times what `follow` needs at 1024.
_MOST_EVALUATIONS = 1 << 26


def config_files(preset: ShapeVAEPreset, torch: Mapping[str, str] | None = None) -> dict[str, str]:
    """Path inside the repository -> text, for the two models of `preset` and for the mesh models.

    torch: the parameters of the torch runtime.
    """
    files = {}
    for graph, spec in preset.specs.items():
        served = {"network": "shapevae", "graph": graph, **(torch or torch_parameters()), "choices": ""}
        files[f"{spec.name}/config.pbtxt"] = tensorrt(spec)
        files[f"{spec.name}/configs/cpu.pbtxt"] = python_onnxruntime(spec)
        files[f"{spec.name}/configs/onnxruntime.pbtxt"] = native_onnxruntime(spec)
        files[f"{spec.name}/configs/rtx.pbtxt"] = python_rtx(spec)
        files[f"{spec.name}/configs/torch.pbtxt"] = python_torch(spec, served, holder=contract.VAE)
    for name, field_calls in _FIELD_CALLS.items():
        parameters = _mesh_parameters(field_calls)
        files[f"{contract.MESH}/{name}"] = code_model(contract.MODELS[contract.MESH], decoupled=True, parameters=parameters)
    files[f"{contract.MESH_UNARY}/config.pbtxt"] = code_model(contract.MODELS[contract.MESH_UNARY])
    return {name: config_text(config) for name, config in files.items()}


def _mesh_parameters(field_calls: int) -> dict[str, str]:
    """The parameters of hunyuan3d_mesh, which explains them in mesh_settings.py."""
    return {
        "resolution": "256",
        "format": "glb",
        "max_faces": "0",
        "keep": "0.005",
        "level": "0",
        "method": "follow",
        "max_evaluations": str(_MOST_EVALUATIONS),
        "max_decodes": "8",
        "max_queued": "64",
        "field_calls": str(field_calls),
        "field_calls_per_decode": "4",
        "queue_timeout_s": "600",
        "total_timeout_s": "14400",  # v2-0 on a laptop's CPU takes hours at high resolutions
        "evaluation_timeout_s": "1800",
    }
