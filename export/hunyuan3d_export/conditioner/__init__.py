"""The image encoder in front of the sampler: DINOv2's last hidden state, one view or several. Needs the extra `conditioner`."""

from .checkpoint import load_conditioner, random_conditioner
from .config import IMAGE_SIZES, VARIANTS, ConditionerConfig
from .model import Conditioner

__all__ = ["IMAGE_SIZES", "VARIANTS", "Conditioner", "ConditionerConfig", "load_conditioner", "random_conditioner"]
