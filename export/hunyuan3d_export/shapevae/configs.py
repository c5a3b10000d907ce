"""The config.pbtxt files of the shape decoder's two models, for every runtime."""

from __future__ import annotations

from collections.abc import Mapping

from hunyuan3d_client import contract

from ..dit.configs import torch_parameters
from ..pbtxt import config_text, native_onnxruntime, python_onnxruntime, python_rtx, python_torch, tensorrt
from .config import ShapeVAEPreset


def config_files(preset: ShapeVAEPreset, torch: Mapping[str, str] | None = None) -> dict[str, str]:
    """Path inside the repository -> text, for the two models of `preset`. torch: the parameters of the torch runtime."""
    files = {}
    for graph, spec in preset.specs.items():
        served = {"network": "shapevae", "graph": graph, **(torch or torch_parameters()), "choices": ""}
        files[f"{spec.name}/config.pbtxt"] = tensorrt(spec)
        files[f"{spec.name}/configs/cpu.pbtxt"] = python_onnxruntime(spec)
        files[f"{spec.name}/configs/onnxruntime.pbtxt"] = native_onnxruntime(spec)
        files[f"{spec.name}/configs/rtx.pbtxt"] = python_rtx(spec)
        files[f"{spec.name}/configs/torch.pbtxt"] = python_torch(spec, served, holder=contract.VAE)
    return {name: config_text(config) for name, config in files.items()}
