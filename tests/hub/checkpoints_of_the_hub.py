"""Synthetic weights in the layouts of the hub: one file with all parts of a shape pipeline, and folders with a config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from hunyuan3d_export.conditioner.checkpoint import random_conditioner
from hunyuan3d_export.dit import PRESETS, DiTConfig, random_model
from hunyuan3d_export.shapevae import PRESETS as VAE_PRESETS
from hunyuan3d_export.shapevae import random_model as random_vae

SCALE_FACTOR = 0.87  # of no published variant
MICRO = {
    "in_channels": 64,
    "context_in_dim": 1536,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
}


def write_checkpoint(path: Path, *, distilled: bool = False, parts: tuple[str, ...] = ("model", "conditioner", "vae")) -> Path:
    """A pipeline's file of tiny sizes with these parts, float32, every parameter random."""
    config = DiTConfig(**MICRO, guidance_embed=True) if distilled else PRESETS["tiny"].config
    networks: dict[str, Any] = {
        "model": lambda: random_model(config, 3),
        "conditioner": lambda: random_conditioner("tiny", 4).dinov2,
        "vae": lambda: random_vae(VAE_PRESETS["tiny"].config, 5),
    }
    prefixes = {"model": "model.", "conditioner": "conditioner.main_image_encoder.model.", "vae": "vae."}
    state: dict[str, torch.Tensor] = {}
    for part in parts:
        state |= {prefixes[part] + key: value.contiguous() for key, value in networks[part]().state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def config(
    *, guidance_embed: bool = True, consistency: bool = True, views: bool = False, mini: bool = False, **vae: object
) -> dict[str, Any]:
    """What upstream writes into a pipeline's config.yaml, with the parts that tell the variants apart."""
    sizes = {"hidden_size": 1024, "depth": 8, "depth_single_blocks": 16} if mini else {}
    schedule = "Consistency" if consistency else ""
    encoder = {"type": "DinoImageEncoderMV" if views else "DinoImageEncoder", "kwargs": {"image_size": 518}}
    return {
        "model": {
            "target": "hy3dgen.shapegen.models.Hunyuan3DDiT",
            "params": {**MICRO, **sizes, "guidance_embed": guidance_embed},
        },
        "vae": {
            "target": "hy3dgen.shapegen.models.ShapeVAE",
            "params": {"include_pi": False, "scale_factor": SCALE_FACTOR, **vae},
        },
        "conditioner": {
            "target": "hy3dgen.shapegen.models.SingleImageEncoder",
            "params": {"main_image_encoder": encoder},
        },
        "scheduler": {"target": f"hy3dgen.shapegen.schedulers.{schedule}FlowMatchEulerDiscreteScheduler"},
    }


def write_folder(folder: Path, values: dict[str, Any] | None = None, **options: Any) -> Path:
    """A folder as the hub lays it out: model.fp16.safetensors of guidance-distilled weights beside config.yaml."""
    write_checkpoint(folder / "model.fp16.safetensors", **{"distilled": True, **options})
    (folder / "config.yaml").write_text(yaml.safe_dump(config() if values is None else values))
    return folder
