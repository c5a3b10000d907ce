"""The config.pbtxt files of the image encoder, of preprocessing and of the ensembles."""

from __future__ import annotations

from hunyuan3d_client import contract

from ..pbtxt import code_model, config_text, ensemble, native_onnxruntime, python_onnxruntime, python_rtx, tensorrt
from .weights import ConditionerServing

# remove_background: what holds for a request that says nothing. evaluation_timeout_s: of one call of hunyuan3d_background.
_PREPROCESS = {"remove_background": "true", "evaluation_timeout_s": "60"}
_MOST_PICTURES = 64  # requests that wait to be decoded; each may hold files of 32 MiB
# The ensembles that begin with a picture. A repository without the encoder has none of them. Those that end in a mesh are loaded
# only where a shape decoder is deployed too.
_ENSEMBLES = (
    contract.IMAGE_CONTEXT,
    contract.PICTURE_LATENTS,
    contract.PICTURE_LATENTS_UNARY,
    contract.PICTURE_MESH,
    contract.PICTURE_MESH_UNARY,
)


def config_files(serving: ConditionerServing) -> dict[str, str]:
    """Path inside the repository -> text, for the encoder, preprocessing and the ensembles."""
    models = {name: spec.sized({"side": serving.image_size}) for name, spec in contract.MODELS.items()}
    conditioner = models[contract.CONDITIONER]
    files = {
        f"{contract.PREPROCESS}/config.pbtxt": code_model(
            models[contract.PREPROCESS], parameters=_PREPROCESS, instances=2, most_queued=_MOST_PICTURES
        ),
        f"{contract.CONDITIONER}/config.pbtxt": tensorrt(conditioner),
        f"{contract.CONDITIONER}/configs/cpu.pbtxt": python_onnxruntime(conditioner),
        f"{contract.CONDITIONER}/configs/onnxruntime.pbtxt": native_onnxruntime(conditioner),
        f"{contract.CONDITIONER}/configs/rtx.pbtxt": python_rtx(conditioner),
    }
    files |= {f"{name}/config.pbtxt": ensemble(models[name], models) for name in _ENSEMBLES}
    return {path: config_text(config) for path, config in files.items()}
