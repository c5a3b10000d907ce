"""The image encoder in front of the sampler: DINOv2's last hidden state of one or more views. Needs the extra `conditioner`."""

import importlib
from typing import TYPE_CHECKING

from .config import IMAGE_SIZES, VARIANTS, ConditionerConfig

if TYPE_CHECKING:
    from .checkpoint import load_conditioner, random_conditioner
    from .model import Conditioner

__all__ = ["IMAGE_SIZES", "VARIANTS", "Conditioner", "ConditionerConfig", "load_conditioner", "random_conditioner"]

if not TYPE_CHECKING:
    # Import on first use: the table of networks imports this package on machines without the extra too.
    def __getattr__(name: str) -> object:
        if name in __all__:
            module = "model" if name == "Conditioner" else "checkpoint"
            return getattr(importlib.import_module(f".{module}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
