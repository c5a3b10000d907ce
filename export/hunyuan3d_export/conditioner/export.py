"""The image encoder's weights -> its ONNX artifact, by the same path as the denoisers'."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from hunyuan3d_client import contract

from .. import onnx_from_torch
from ..files import sha256
from ..manifest import code_digest, reusable, versions_of
from ..onnx_from_torch import Graph, OnnxOptions, stage, write_graph
from ..weights import PRECISIONS
from .checkpoint import FOLDER_FILE, load_conditioner, random_conditioner
from .config import IMAGE_SIZES, VIEWS
from .model import Conditioner

# The form of attention in the graph -> transformers' implementation that traces to it.
_ATTENTION = {"op": "sdpa", "decomposed": "eager"}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionerSource:
    """`path`, a checkpoint or a transformers folder; or (None) random weights of `variant` from `seed`. For pictures of
    image_size pixels; views 4 adds the view vectors of the multi-view variants."""

    path: Path | None = None
    variant: str = "tiny"
    seed: int = 0
    image_size: int = IMAGE_SIZES[0]
    views: int = VIEWS[0]

    def identity(self) -> dict[str, Any]:
        """What the weights are, as JSON. Raises FileNotFoundError when there are none."""
        if self.path is None:
            return {"variant": self.variant, "seed": self.seed}
        file = self.path / FOLDER_FILE if self.path.is_dir() else self.path
        if not file.is_file():
            raise FileNotFoundError(f"conditioner must be a checkpoint or a folder with {FOLDER_FILE}, found nothing at {file}")
        return {"checkpoint_sha256": sha256(file)}

    def load(self, dtype: torch.dtype = torch.float32, *, attention: str = "sdpa") -> Conditioner:
        """The encoder in this dtype, in eval mode on the CPU. Raises CheckpointError, ValueError."""
        sizes = {"image_size": self.image_size, "views": self.views}
        if self.path is None:
            return random_conditioner(self.variant, self.seed, **sizes, dtype=dtype, attention=attention)
        return load_conditioner(self.path, **sizes, dtype=dtype, attention=attention)


def export_conditioner(source: ConditionerSource, out: Path, options: OnnxOptions | None = None) -> Path:
    """Writes the artifact folder `out`/hunyuan3d_conditioner, unless one that still matches is there; returns it.

    Raises CheckpointError for unreadable weights, ValueError for sizes the published variants do not have.
    """
    options = options or OnnxOptions()
    folder = out / contract.CONDITIONER
    sizes = {"image_size": source.image_size, "views": source.views}
    made_from = {"weights": source.identity(), **sizes, **_made_by(), **dataclasses.asdict(options)}
    if reusable(folder, made_from):
        logger.info("%s: unchanged, kept", folder)
        return folder
    with stage("load weights"):
        model = source.load(PRECISIONS[options.precision], attention=_ATTENTION[options.attention])
    axes = dict(contract.IMAGE_AXES)
    if source.views == 1:
        del axes["V"]
    example = {"B": 2, "V": 3 if source.views > 1 else 1, "P": source.image_size}
    graph = Graph(module=model, spec=contract.IMAGE_MODELS[contract.CONDITIONER], axes=axes, example=example)
    write_graph(graph, folder, made_from, sizes)
    return folder


def _made_by() -> dict[str, Any]:
    here = Path(__file__).parent
    code = code_digest([Path(onnx_from_torch.__file__), Path(contract.__file__), *here.glob("*.py")])
    versions = versions_of("torch", "onnx", "onnxscript", "transformers")
    return {"opset": onnx_from_torch.OPSET, "code": code, "versions": versions}
