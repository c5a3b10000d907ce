"""The `shapes` preset from its user's side: words become the condition of a sample, and its latents become points.

Importing this needs numpy alone. `pictures` imports matplotlib and Pillow when a picture is drawn.
"""

from ..contract import CONTEXT_WIDTH, LATENT_CHANNELS
from .codec import POINT_SCALE, decode_points, encode_points, frame, out_of_subspace_energy
from .words import embed_prompt

__all__ = [
    "CONTEXT_WIDTH",
    "LATENT_CHANNELS",
    "POINT_SCALE",
    "decode_points",
    "embed_prompt",
    "encode_points",
    "frame",
    "out_of_subspace_energy",
]
