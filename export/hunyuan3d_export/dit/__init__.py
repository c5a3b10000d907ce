"""Hunyuan3DDiT, the flow-matching transformer of Hunyuan3D-2, with its presets and checkpoint files."""

from ..attention import EfficientAttention
from .checkpoint import CheckpointError, load_checkpoint, random_model, save_checkpoint
from .config import PRESETS, DiTConfig, Preset
from .model import Hunyuan3DDiT

__all__ = [
    "PRESETS",
    "CheckpointError",
    "DiTConfig",
    "EfficientAttention",
    "Hunyuan3DDiT",
    "Preset",
    "load_checkpoint",
    "random_model",
    "save_checkpoint",
]
