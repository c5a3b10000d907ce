"""The decoder's graphs as modules, and how the server's runtime `torch` loads one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs import chosen_graph
from ..manifest import Manifest
from ..precisions import WIRE_DTYPES
from .checkpoint import load_checkpoint
from .config import ShapeVAEConfig, ShapeVAEPreset
from .model import ShapeVAEDecoder


class KeysValues(nn.Module):
    """The sampler's latents [B, L, C] float32 -> k, v, each [B, H, L, d] in the dtype that the preset names."""

    def __init__(self, decoder: ShapeVAEDecoder, preset: ShapeVAEPreset) -> None:
        super().__init__()
        self.decoder = decoder
        self.scale = 1 / preset.scale_factor
        self.dtype = WIRE_DTYPES[preset.keys_values]
        self.eval()

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.decoder.keys_values(latents * self.scale)
        return k.to(self.dtype), v.to(self.dtype)


class Field(nn.Module):
    """ShapeVAEDecoder.field as the forward of a module."""

    def __init__(self, decoder: ShapeVAEDecoder, _preset: ShapeVAEPreset) -> None:
        super().__init__()
        self.decoder = decoder
        self.eval()

    def forward(self, queries: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.decoder.field(queries, k, v)


MODULES: Mapping[str, Callable[[ShapeVAEDecoder, ShapeVAEPreset], nn.Module]] = {"vae": KeysValues, "field": Field}


def preset_from_json(serving: Mapping[str, Any]) -> ShapeVAEPreset:
    """The ShapeVAEPreset that a manifest's `serving` holds."""
    return ShapeVAEPreset(**{**serving, "config": ShapeVAEConfig(**serving["config"])})


def load(
    path: Path,
    graph: str,
    *,
    dtype: torch.dtype | None,
    attention_backend: str | None,
    choices: Mapping[str, str],
    device: torch.device,  # noqa: ARG001
) -> nn.Module:
    """The module of `graph`, vae or field, with the weights of a checkpoint and the facts of the manifest beside it.

    Raises CheckpointError for an unreadable file, ManifestError without a manifest, ValueError for an unknown graph or backend.
    """
    if choices:
        raise ValueError(f"choices must be empty, got {', '.join(choices)}")
    module = chosen_graph(MODULES, graph)
    manifest = Manifest.read(path.parent, hint="the scale factor is in it; deploy the checkpoint again")
    preset = preset_from_json(manifest.serving)
    decoder = load_checkpoint(path, include_pi=preset.include_pi, dtype=dtype, attention_backend=attention_backend)
    return module(decoder, preset)
