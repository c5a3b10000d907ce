"""Reads and writes checkpoint files in upstream's format. The config is derived from their keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import NAMED_KEYS, CheckpointError, check_dtypes, check_finite, check_state, read_state
from ..files import atomic_path
from .config import DiTConfig
from .model import Hunyuan3DDiT

__all__ = ["CheckpointError", "derive_config", "load_checkpoint", "random_model", "read_config", "save_checkpoint"]

PREFIX = "model."  # of the DiT's keys; a file may also have keys under `vae.` and `conditioner.`
_PROBE = "latent_in.weight"


def load_checkpoint(
    path: str | Path, *, dtype: torch.dtype | None = None, attention_backend: str | None = None
) -> Hunyuan3DDiT:
    """The DiT in a .safetensors or .ckpt file, in eval mode, on the CPU.

    The kind of file is read from its content, the config from keys and shapes. Weights stay memory-mapped where the
    format and `dtype` (None keeps the file's dtype) allow it.

    Raises FileNotFoundError, and CheckpointError when the file is damaged, holds no DiT, its keys do not fit, or a weight is NaN
    or infinite.
    """
    model = _mapped(Path(path), dtype, attention_backend)
    check_finite(model.state_dict(), Path(path))
    return model


def read_config(path: Path) -> DiTConfig:
    """The config of the DiT in a file, whose tensors stay on disk. Raises as load_checkpoint does, but for weights' values."""
    return _mapped(path, None, None).config


def _mapped(path: Path, dtype: torch.dtype | None, attention_backend: str | None) -> Hunyuan3DDiT:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"checkpoint must be a .safetensors or .ckpt file, found {found} at {path}")
    state = read_state(path, _select)
    config = derive_config({key: tuple(value.shape) for key, value in state.items()}, path)
    with torch.device("meta"):
        model = Hunyuan3DDiT(config, attention_backend=attention_backend)
    check_state(state, model.state_dict(), path, "Hunyuan3DDiT")
    if dtype is not None:
        state = {key: value.to(dtype) for key, value in state.items()}
    check_dtypes(state, path)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def save_checkpoint(model: Hunyuan3DDiT, path: str | Path, *, dtype: torch.dtype | None = torch.float16) -> None:
    """Writes upstream's format: keys under `model.`, safetensors or (by the suffix .ckpt) a pickled dict of parts.

    dtype: of the stored weights (None keeps the model's dtype). The file appears whole or not at all.

    Raises ValueError for a path with another suffix.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"checkpoint name must end in .safetensors or .ckpt, got {path.name}")
    state = {key: value.detach().to("cpu", dtype or value.dtype).contiguous() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        if path.suffix == ".ckpt":
            torch.save({PREFIX.rstrip("."): state}, temporary)
        else:
            from safetensors.torch import save_file  # imported here, because random weights work without safetensors

            save_file({PREFIX + key: value for key, value in state.items()}, temporary)


def random_model(
    config: DiTConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, attention_backend: str | None = None
) -> Hunyuan3DDiT:
    """A model in eval mode. Every parameter is drawn from `seed`, including norm scales and biases.

    No parameter is zero, because a gate of zero would hide every error in its branch from parity checks.
    """
    with torch.device("meta"):
        model = Hunyuan3DDiT(config, attention_backend=attention_backend)
    generator = torch.Generator().manual_seed(seed)
    model.load_state_dict(
        {key: _draw(key, value.shape, generator).to(dtype) for key, value in model.state_dict().items()}, assign=True
    )
    return model.requires_grad_(False).eval()


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if key.endswith(".scale"):
        return 1 + 0.2 * noise
    return 0.1 * noise if len(shape) == 1 else noise / shape[1] ** 0.5


def derive_config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> DiTConfig:
    """The config that a state dict with these keys and shapes belongs to.

    Raises CheckpointError when a key that the config is read from is missing or has an impossible shape.
    """
    try:
        hidden_size, in_channels = shapes[_PROBE]
        (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
        return DiTConfig(
            in_channels=in_channels,
            context_in_dim=shapes["cond_in.weight"][1],
            hidden_size=hidden_size,
            mlp_ratio=_ratio(shapes["double_blocks.0.img_mlp.0.weight"][0], hidden_size),
            num_heads=hidden_size // head_dim,
            depth=_depth(shapes, "double_blocks."),
            depth_single_blocks=_depth(shapes, "single_blocks."),
            guidance_embed=any(key.startswith("guidance_in.") for key in shapes),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} must hold all keys of a Hunyuan3DDiT, missing {error.args[0]}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} must have the shapes of a Hunyuan3DDiT: {error}") from error


def _ratio(mlp_hidden_size: int, hidden_size: int) -> float:
    """mlp_hidden_size / hidden_size, rounded so that int(hidden_size * ratio) gives it back: (1 / 49) * 49 is less than 1."""
    ratio = mlp_hidden_size / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_hidden_size else math.nextafter(ratio, math.inf)


def _depth(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    depth = 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith(prefix)), default=-1)
    if depth > len(shapes):  # one stray key must not cause a model of a million blocks
        raise ValueError(f"{prefix}N must be numbered without gaps, got {prefix}{depth - 1} among {len(shapes)} keys")
    return depth


def _select(keys: list[str], get: Callable[[str], Tensor], path: Path) -> dict[str, Tensor]:
    """The DiT's tensors: those under `model.`, with this prefix removed, or all tensors of a file without prefixes."""
    for prefix in (PREFIX, ""):
        if prefix + _PROBE in keys:
            return {key[len(prefix) :]: get(key) for key in keys if key.startswith(prefix)}
    parts = sorted({key.split(".")[0] for key in keys})
    raise CheckpointError(
        f"{path} must hold a DiT (key {PREFIX}{_PROBE} or {_PROBE}), found the parts {', '.join(parts[:NAMED_KEYS]) or 'none'}\n"
        "hint: pass the model file of the shape pipeline (hunyuan3d-dit-*/model*.safetensors), not the VAE's"
    )
