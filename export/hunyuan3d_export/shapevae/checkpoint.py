"""Reads and writes the decoder's weights in upstream's format. The config is derived from their keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import NAMED_KEYS, CheckpointError, check_dtypes, check_finite, check_state, read_state
from ..files import atomic_path
from .config import PRESETS, ShapeVAEConfig
from .model import ShapeVAEDecoder

__all__ = ["CheckpointError", "derive_config", "load_checkpoint", "random_model", "save_checkpoint"]

PREFIX = "vae."  # of the decoder's keys beside a DiT; a file of the VAE alone has no prefix
_DECODER_KEY = re.compile(r"(?:.*\.)?(?=(?:post_kl|geo_decoder)\.)")
_ENCODER_PARTS = ("encoder.", "pre_kl.")  # of the files named "-withencoder"
_BLOCKS = "transformer.resblocks."
_CROSS = "geo_decoder.cross_attn_decoder."
_USUAL_HEAD_DIM = 64


def load_checkpoint(
    path: str | Path, *, include_pi: bool = False, dtype: torch.dtype | None = None, attention_backend: str | None = None
) -> ShapeVAEDecoder:
    """The decoder in a .safetensors or .ckpt file, in eval mode, on the CPU. The file is a VAE's own, or a DiT's with its VAE.

    The kind of file is read from its content, the config from keys and shapes. An encoder's weights are left out. include_pi: see
    ShapeVAEPreset. dtype: None keeps the file's dtype.

    Raises FileNotFoundError, and CheckpointError when the file is damaged, holds no ShapeVAE, its keys do not fit, or a weight is
    NaN or infinite.
    """
    model = _mapped(Path(path), include_pi=include_pi, dtype=dtype, attention_backend=attention_backend)
    check_finite(model.state_dict(), Path(path))
    return model


def read_config(path: Path) -> ShapeVAEConfig:
    """The config of the decoder in a file, whose tensors stay on disk. Raises as load_checkpoint does, but for weights' values."""
    return _mapped(path, include_pi=False, dtype=None, attention_backend=None).config


def _mapped(path: Path, *, include_pi: bool, dtype: torch.dtype | None, attention_backend: str | None) -> ShapeVAEDecoder:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"checkpoint must be a .safetensors or .ckpt file, found {found} at {path}")
    state = read_state(path, _select)
    config = derive_config({key: tuple(value.shape) for key, value in state.items()}, path)
    with torch.device("meta"):
        model = ShapeVAEDecoder(config, include_pi=include_pi, attention_backend=attention_backend)
    check_state(state, model.state_dict(), path, f"ShapeVAE decoder (by its sizes {_likely_variant(config)})")
    if dtype is not None:
        state = {key: value.to(dtype) for key, value in state.items()}
    check_dtypes(state, path)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def save_checkpoint(model: ShapeVAEDecoder, path: str | Path, *, dtype: torch.dtype | None = torch.float16) -> None:
    """Writes a .safetensors file with keys under `vae.`, which appears whole or not at all.

    dtype: of the stored weights (None keeps the model's dtype).
    """
    from safetensors.torch import save_file  # imported here, because random weights work without safetensors

    state = {key: value.detach().to("cpu", dtype or value.dtype).contiguous() for key, value in model.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        save_file({PREFIX + key: value for key, value in state.items()}, temporary)


def random_model(
    config: ShapeVAEConfig,
    seed: int = 0,
    *,
    include_pi: bool = False,
    dtype: torch.dtype = torch.float32,
    attention_backend: str | None = None,
) -> ShapeVAEDecoder:
    """A decoder in eval mode. Every parameter is drawn from `seed`, including the weights and biases of norms."""
    with torch.device("meta"):
        model = ShapeVAEDecoder(config, include_pi=include_pi, attention_backend=attention_backend)
    generator = torch.Generator().manual_seed(seed)
    state = {key: _draw(key, value.shape, generator).to(dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.2 * noise if key.endswith("weight") else 0.1 * noise
    return noise / shape[1] ** 0.5


def derive_config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> ShapeVAEConfig:
    """The config that a decoder's state dict with these keys and shapes belongs to.

    Raises CheckpointError when a key that the config is read from is missing or has an impossible shape.
    """
    try:
        width, embed_dim = shapes["post_kl.weight"]
        geo_width, features = shapes["geo_decoder.query_proj.weight"]
        head_dim = _head_dim(shapes)
        return ShapeVAEConfig(
            embed_dim=embed_dim,
            width=width,
            heads=_whole(width, head_dim),
            num_decoder_layers=_layers(shapes),
            geo_decoder_downsample_ratio=_whole(width, geo_width),
            geo_decoder_mlp_expand_ratio=_whole(shapes[f"{_CROSS}mlp.c_fc.weight"][0], geo_width),
            geo_decoder_ln_post=_any(shapes, "geo_decoder.ln_post.") or _has_norms(shapes, _CROSS),
            num_freqs=_whole(_whole(features, 3) - 1, 2),
            qkv_bias=_any(shapes, f"{_CROSS}attn.c_q.bias") or any(key.endswith(".attn.c_qkv.bias") for key in shapes),
            qk_norm=_has_norms(shapes, ""),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} must hold all keys of a ShapeVAE decoder, missing {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} must have the shapes of a ShapeVAE decoder: {error}") from error


def _any(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)


def _has_norms(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    """Whether some attention below `prefix` normalises its queries and keys."""
    return any(key.startswith(prefix) and ".attn.attention." in key for key in shapes)


def _head_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size of a head, which only the norms of queries and keys show. Weights without these norms have the usual size."""
    norms = [shape for key, shape in shapes.items() if ".attn.attention." in key]
    return norms[0][0] if norms else _USUAL_HEAD_DIM


def _whole(size: int, divisor: int) -> int:
    if size % divisor:
        raise ValueError(f"{size} must be a multiple of {divisor}")
    return size // divisor


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    numbers = {int(key.removeprefix(_BLOCKS).split(".")[0]) for key in shapes if key.startswith(_BLOCKS)}
    layers = 1 + max(numbers, default=-1)
    if layers > len(shapes):  # one stray key must not cause a model of a million blocks
        raise ValueError(f"{_BLOCKS}N must be numbered without gaps, got {layers - 1} among {len(shapes)} keys")
    return layers


def _likely_variant(config: ShapeVAEConfig) -> str:
    """The published variants whose geometry decoder has the sizes of this config."""
    ratio = config.geo_decoder_downsample_ratio
    names = [name for name, each in PRESETS.items() if name.startswith("v2-") and each.config.width == config.width]
    fitting = [name for name in names if PRESETS[name].config.geo_decoder_downsample_ratio == ratio]
    return f"one of {', '.join(fitting)}" if fitting else "of no published variant"


def _select(keys: list[str], get: Callable[[str], Tensor], path: Path) -> dict[str, Tensor]:
    """The decoder's tensors, with the prefix of their keys removed: those under `vae.`, or those of the file's only VAE."""
    prefixes = sorted({match[0] for key in keys if (match := _DECODER_KEY.match(key))})
    prefix = PREFIX if PREFIX in prefixes else prefixes[0] if len(prefixes) == 1 else None
    if prefix is None:
        parts = sorted({key.split(".")[0] for key in keys})
        raise CheckpointError(
            f"{path} must hold a ShapeVAE (key {PREFIX}post_kl.weight or post_kl.weight), "
            f"found the parts {', '.join(parts[:NAMED_KEYS]) or 'none'}\n"
            "hint: pass the shape pipeline's model file with all its parts, or the VAE's own (hunyuan3d-vae-*/model*.safetensors)"
        )
    own = {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}
    return {name: get(key) for name, key in own.items() if not name.startswith(_ENCODER_PARTS)}
