"""The config.pbtxt files of the saliency network."""

from __future__ import annotations

from hunyuan3d_client import contract

from ..pbtxt import config_text, native_onnxruntime, python_onnxruntime, python_rtx, tensorrt
from .weights import BackgroundServing


def config_files(serving: BackgroundServing) -> dict[str, str]:
    """Path inside the repository -> text. A network whose file fixes the batch gets requests one by one."""
    spec = contract.MODELS[contract.BACKGROUND].sized({"side": serving.side})
    profile = {"B": contract.AxisRange(1, min(contract.AXES["B"].opt, serving.batch), serving.batch)}
    configs = {
        "config": tensorrt(spec, profile),
        "configs/cpu": python_onnxruntime(spec),
        "configs/onnxruntime": native_onnxruntime(spec),
        "configs/rtx": python_rtx(spec, profile),
    }
    for config in configs.values():
        config.max_batch_size = serving.batch
    return {f"{contract.BACKGROUND}/{path}.pbtxt": config_text(config) for path, config in configs.items()}
