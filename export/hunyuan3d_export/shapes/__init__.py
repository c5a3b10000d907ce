"""The `shapes` preset: solids named by a few words, drawn as clouds of points, with the exact surfaces to measure them by.

Everything here needs numpy alone, except `reference` (torch) and `pictures` (matplotlib).
"""

from ..dit.weights import SHIPPED
from .codec import LATENT_CHANNELS, POINT_SCALE, decode_points, encode_points, frame, out_of_subspace_energy
from .prompts import HELD_OUT, PROMPTS, TRAINED_PROMPTS, solid
from .words import CONTEXT_WIDTH, embed_prompt

CHECKPOINT = SHIPPED["shapes"]

__all__ = [
    "CHECKPOINT",
    "CONTEXT_WIDTH",
    "HELD_OUT",
    "LATENT_CHANNELS",
    "POINT_SCALE",
    "PROMPTS",
    "TRAINED_PROMPTS",
    "decode_points",
    "embed_prompt",
    "encode_points",
    "frame",
    "out_of_subspace_energy",
    "solid",
]
