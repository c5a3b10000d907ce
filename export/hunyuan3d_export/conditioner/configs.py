"""The config.pbtxt files of the image encoder, of preprocessing and of the ensembles."""

from __future__ import annotations

from hunyuan3d_client import contract

from ..pbtxt import code_model, config_text, ensemble, native_onnxruntime, python_onnxruntime, python_rtx, tensorrt
from .weights import ConditionerServing

# The models that process pictures. A repository without the encoder has none of them.
_IN_FRONT = (contract.PREPROCESS, contract.IMAGE_CONTEXT, contract.ENSEMBLE, contract.ENSEMBLE_UNARY)


def config_files(serving: ConditionerServing) -> dict[str, str]:
    """Path inside the repository -> text, for the encoder, preprocessing and the ensembles."""
    models = {name: spec.sized({"side": serving.image_size}) for name, spec in contract.MODELS.items()}
    conditioner = models[contract.CONDITIONER]
    files = {
        f"{contract.PREPROCESS}/config.pbtxt": code_model(models[contract.PREPROCESS]),
        f"{contract.CONDITIONER}/config.pbtxt": tensorrt(conditioner),
        f"{contract.CONDITIONER}/configs/cpu.pbtxt": python_onnxruntime(conditioner),
        f"{contract.CONDITIONER}/configs/onnxruntime.pbtxt": native_onnxruntime(conditioner),
        f"{contract.CONDITIONER}/configs/rtx.pbtxt": python_rtx(conditioner),
    }
    files |= {f"{name}/config.pbtxt": ensemble(models[name], models) for name in _IN_FRONT if models[name].steps}
    return {path: config_text(config) for path, config in files.items()}
