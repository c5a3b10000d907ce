"""Reads a DINOv2's weights from a shape pipeline's checkpoint or a transformers folder, in either layout of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hunyuan3d_client import contract

from ..checkpoints import CheckpointError, check_finite, check_state, read_state
from ..files import atomic_path
from .config import FOLDER_FILE, VARIANTS, ConditionerConfig, Words
from .model import Conditioner, resized_positions, view_vectors

_PROBE = "embeddings.cls_token"
_PART = "conditioner.main_image_encoder.model."
_POSITIONS = "embeddings.position_embeddings"
_HEAD, _HEAD_PART = "head.", "conditioner.head."  # of the keys of a WordHead, in the module and in a file
# Names before transformers 5 -> names since then. weights_in joins two matrices: first gate_proj, then up_proj.
_RENAMED = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)


def load_conditioner(
    path: Path, *, image_size: int, views: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> Conditioner:
    """The encoder in a shape pipeline's checkpoint, or in a folder or file of transformers, in eval mode on the CPU.

    The encoder's sizes are read from its weights. Position embeddings are interpolated to `image_size`.

    Raises FileNotFoundError, and CheckpointError when the file is damaged, holds no DINOv2, its keys do not fit, or a weight is
    NaN or infinite.
    """
    file = path / FOLDER_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"conditioner must be a checkpoint or a folder with {FOLDER_FILE}, found nothing at {file}")
    state = current_layout(read_state(file, _select))
    config = _derive_config(state, file, image_size=image_size, views=views)
    state[_POSITIONS] = resized_positions(state[_POSITIONS], image_size)
    state = {key: value.to(dtype) for key, value in state.items()}
    check_finite(state, file)
    return _build(config, state, attention, file)


def random_conditioner(
    variant: str,
    seed: int = 0,
    *,
    image_size: int = 518,
    views: int = 1,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Conditioner:
    """An encoder out of VARIANTS. Every parameter is drawn from `seed`, including norms, biases and layer scales.

    Raises ValueError for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    depth, mlp_ratio = VARIANTS[variant]
    config = ConditionerConfig(
        hidden_size=contract.CONTEXT_WIDTH, depth=depth, mlp_ratio=mlp_ratio, gated=True, image_size=image_size, views=views
    )
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Conditioner(config).dinov2.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state = {key: _draw(key, shape, generator).to(dtype) for key, shape in shapes.items()}
    return _build(config, state, attention, Path(variant))


def current_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys of transformers 5. `state` may have the keys of transformers 5 or of earlier versions."""
    renamed = {}
    for key, value in state.items():
        if ".mlp.weights_in." in key:
            for name, half in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                renamed[key.replace("weights_in", name)] = half
            continue
        for pattern, new in _RENAMED:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    return renamed


def _build(config: ConditionerConfig, state: dict[str, Tensor], attention: str, path: Path) -> Conditioner:
    with torch.device("meta"):
        model = Conditioner(config, attention=attention)
    expected = dict(model.dinov2.state_dict())
    if model.head is not None:
        expected |= {_HEAD + key: value for key, value in model.head.state_dict().items()}
    # Some files lack the mask token, because only pre-training uses it.
    state.setdefault("embeddings.mask_token", torch.zeros(expected["embeddings.mask_token"].shape, dtype=state[_PROBE].dtype))
    check_state(state, expected, path, "DINOv2")
    head = {key.removeprefix(_HEAD): state.pop(key) for key in [*state] if key.startswith(_HEAD)}
    model.dinov2.load_state_dict(state, strict=True, assign=True)
    if model.head is not None:
        model.head.load_state_dict(head, strict=True, assign=True)
    model.view_vectors = view_vectors(config.views, config.hidden_size)  # those made by Conditioner are on the meta device
    return model.requires_grad_(False).eval()


def save_conditioner(model: Conditioner, path: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Writes a .safetensors file that load_conditioner reads; it appears whole or not at all."""
    from safetensors.torch import save_file  # imported here, because random weights work without safetensors

    parts = [(_PART, model.dinov2), *([(_HEAD_PART, model.head)] if model.head else [])]
    state = {prefix + key: value for prefix, part in parts for key, value in part.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file({key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}, temporary)


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if key.endswith("lambda1") or (len(shape) == 1 and key.endswith("weight")):
        return 1 + 0.2 * noise
    if key.startswith("embeddings.") and "projection" not in key:
        return 0.5 * noise
    return 0.1 * noise if len(shape) == 1 else noise / shape[1:].numel() ** 0.5


def _derive_config(state: Mapping[str, Tensor], path: Path, *, image_size: int, views: int) -> ConditionerConfig:
    hidden_size = state[_PROBE].shape[-1]
    depth = len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")})
    gated = "encoder.layer.0.mlp.down_proj.weight" in state
    name = "encoder.layer.0.mlp.down_proj.weight" if gated else "encoder.layer.0.mlp.fc2.weight"
    for key in (name, _POSITIONS):
        if key not in state:
            raise CheckpointError(f"{path} must hold all keys of a DINOv2, missing {key}")
    # The hidden size of a gated block is two thirds of the usual one, rounded up to a multiple of 8.
    hidden = state[name].shape[-1] * 3 / 2 if gated else state[name].shape[-1]
    words = _derive_words(state, hidden_size)
    if words is None and hidden_size != contract.CONTEXT_WIDTH:
        raise CheckpointError(f"{path} must hold a DINOv2 of width {contract.CONTEXT_WIDTH} (giant), got {hidden_size}")
    return ConditionerConfig(
        hidden_size=hidden_size,
        depth=depth,
        mlp_ratio=round(hidden / hidden_size),
        gated=gated,
        image_size=image_size,
        views=views,
        words=words,
    )


def _derive_words(state: Mapping[str, Tensor], hidden_size: int) -> Words | None:
    """The sizes of the head that reads words; None for an encoder without one."""
    choice, vectors = state.get(f"{_HEAD}choice.weight"), state.get(f"{_HEAD}vectors")
    if choice is None or vectors is None:
        return None
    return Words(tokens=choice.numel() // (hidden_size * len(vectors)), vocabulary=len(vectors))


def _select(keys: list[str], get: Callable[[str], Tensor], path: Path) -> dict[str, Tensor]:
    """The encoder's tensors, with the prefix of their keys removed: the main image encoder, or the file's only DINOv2."""
    found = sorted({key.removesuffix(_PROBE) for key in keys if key.endswith(_PROBE)})
    prefix = _PART if _PART in found else found[0] if len(found) == 1 else None
    if prefix is None:
        parts = ", ".join(sorted({key.split(".")[0] for key in keys})[:10]) or "none"
        raise CheckpointError(
            f"{path} must hold one DINOv2 (key {_PART}{_PROBE} or {_PROBE}), found the parts {parts}\n"
            "hint: pass the model file of the shape pipeline (hunyuan3d-dit-*/model*.safetensors), or a DINOv2-giant folder"
        )
    head = {_HEAD + key.removeprefix(_HEAD_PART): get(key) for key in keys if key.startswith(_HEAD_PART)}
    return {key[len(prefix) :]: get(key) for key in keys if key.startswith(prefix)} | head
