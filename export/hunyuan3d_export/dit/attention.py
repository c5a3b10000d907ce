"""The light attention function: one call, a backend by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _standard(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # q is scaled before the product: in half precision the scores of long sequences would overflow after it.
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  #  [B, H, Lq, Lk]
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1) @ v


BACKENDS: dict[str, AttentionFunction] = {"sdpa": _sdpa, "standard": _standard}


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v with the heads merged.

    q [B, H, Lq, D], k and v [B, H, Lk, D], bias broadcastable to [B, H, Lq, Lk] -> [B, Lq, H*D], all of one dtype.

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return rearrange(BACKENDS[backend](q, k, v, bias), "B H L D -> B L (H D)")
