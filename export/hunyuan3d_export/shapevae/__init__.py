"""The decoder of Hunyuan3D-2's ShapeVAE, which turns latents into a signed field, with its presets and checkpoint files."""

from .checkpoint import CheckpointError, load_checkpoint, random_model, save_checkpoint
from .config import PRESETS, ShapeVAEConfig, ShapeVAEPreset
from .model import ShapeVAEDecoder

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ShapeVAEConfig",
    "ShapeVAEDecoder",
    "ShapeVAEPreset",
    "load_checkpoint",
    "random_model",
    "save_checkpoint",
]
