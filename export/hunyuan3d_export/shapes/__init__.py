"""The `shapes` preset: solids named by a few words, drawn as clouds of points, with the exact surfaces to measure them by.

The words and the point codec are defined in the client's package hunyuan3d_client.shapes and re-exported here. This package
imports only numpy; its modules `reference`, `served` and `gate` also need torch.
"""

from hunyuan3d_client.shapes import (
    CONTEXT_WIDTH,
    LATENT_CHANNELS,
    POINT_SCALE,
    decode_points,
    embed_prompt,
    encode_points,
    frame,
    out_of_subspace_energy,
)

from ..dit.weights import SHIPPED
from .prompts import HELD_OUT, PROMPTS, TRAINED_PROMPTS, solid

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
