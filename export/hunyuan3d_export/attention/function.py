"""attention(), a function over queries, keys and values, and the table of backends that can compute it.

Axes: B batch, H heads, Lq queries, Lk keys, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

CHUNK_SIZE = 512
SAGE_SWITCH = "USE_SAGEATTN"
_HALVES = (torch.float16, torch.bfloat16)
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Call:
    """The options of one call: what changes the scores and the weights, and how much of them exists at a time.

    bias is added to the scores and broadcasts to [B, H, Lq, Lk]. mask must have these four axes. chunk_size is the number of
    queries whose scores exist at a time; only the backend `chunked` reads it.
    """

    bias: Tensor | None
    mask: Tensor | None
    causal: bool
    dropout: float
    chunk_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.bias is not None and not self.bias.is_floating_point():
            raise ValueError(f"bias must be floating-point, got {self.bias.dtype}\nhint: mask= takes bool")

    @property
    def terms(self) -> tuple[Tensor, ...]:
        return tuple(term for term in (self.bias, self.mask) if term is not None)


@dataclasses.dataclass(frozen=True)
class Backend:
    """run computes the output [B, H, Lq, D]. refusal returns why run cannot take a call, or None when run can."""

    run: Callable[[Tensor, Tensor, Tensor, Call], Tensor]
    refusal: Callable[[Tensor, Tensor, Tensor, Call], str | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: str = "sdpa",
    chunk_size: int = CHUNK_SIZE,
    fall_back: bool = False,
) -> Tensor:
    """Attention softmax(q k^T / sqrt(D) + bias) v, with the heads merged.

    q [B, H, Lq, D], k and v [B, H, Lk, D], all of one dtype -> [B, Lq, H*D].

    bias: finite, broadcastable to [B, H, Lq, Lk]. It is rounded to q's dtype, as an additive mask is, and added to the scores.
    mask: bool (True: the query sees this key) or additive (-inf: it does not), of shape [Lq, Lk], [B, Lq, Lk] or
        [B, H, Lq, Lk]; any axis of the last two may be 1. Or bool padding [B, Lk]. A query that sees no key gets zeros.
    causal: query i sees keys 0..i. dropout: the probability of dropping an attention weight, applied whenever it is not 0.
    fall_back: where `backend` refuses the call, run `sdpa`, which takes every call. Each reason is logged once.

    Raises ValueError for an unknown backend, a mask that does not fit, a bias that is not floating-point or a call that the
    backend refuses, and ImportError for `sage` without its package.
    """
    call = Call(bias, None if mask is None else four_axes(mask, q, k), causal, dropout, chunk_size)
    chosen = BACKENDS[known_backend(backend)]
    reason = chosen.refusal(q, k, v, call)
    if reason is not None:
        if not fall_back:
            require_backend(backend)
            raise ValueError(f"attention backend {backend} must get {reason}\nhint: backend='sdpa' takes every call")
        log_once(_logger, f"attention falls back from {backend} to sdpa: it must get {reason}")
        chosen = BACKENDS["sdpa"]
    return rearrange(chosen.run(q, k, v, call), "B H L D -> B L (H D)")


def known_backend(name: str, *also: str) -> str:
    """Returns the name. Raises ValueError when the name is neither a backend's nor one of `also`."""
    if name not in (*also, *BACKENDS):
        raise ValueError(f"attention backend must be one of {', '.join((*also, *BACKENDS))}, got {name!r}")
    return name


def require_backend(name: str) -> None:
    """Raises ImportError when the package of this backend is missing."""
    if name == "sage":
        _sage_kernel()


def resolve_backend(name: str | None) -> str:
    """The backend of a model under construction: `name` where given, else `sage` where USE_SAGEATTN=1, else `sdpa`.

    Raises ValueError for an unknown backend or value of USE_SAGEATTN, and ImportError for `sage` without its package.
    """
    if name is None:
        name = "sage" if sage_wanted() else "sdpa"
    require_backend(known_backend(name))
    return name


def sage_wanted() -> bool:
    """Whether the environment variable USE_SAGEATTN is 1. Raises ValueError when it is neither 0, 1 nor empty."""
    value = os.environ.get(SAGE_SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SAGE_SWITCH} must be 0 or 1, got {value!r}")
    return value == "1"


@functools.lru_cache(maxsize=256)
def log_once(logger: logging.Logger, message: str) -> None:
    logger.warning(message)


def four_axes(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask, given in any form that attention() takes, with the axes [B, H, Lq, Lk], each of full size or 1.

    Raises ValueError when the mask does not fit, or when it could be both padding [B, Lk] and pairs [Lq, Lk].
    """
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask must be bool or floating-point, got {mask.dtype}\nhint: mask.bool(), True for keys that are seen"
        )
    padding = mask.dtype == torch.bool and mask.shape == (batch, keys)
    pairs = mask.shape == (queries, keys)
    if padding and pairs and batch > 1:
        raise ValueError(
            f"mask must be clear, got {[batch, keys]} where B = Lq: padding or pairs?\n"
            "hint: mask[:, None, :] for padding [B, 1, Lk], mask[None] for pairs [1, Lq, Lk]"
        )
    if padding:
        return mask[:, None, None, :]
    full = mask[None, None] if pairs else mask[:, None] if mask.dim() == 3 else mask
    sizes = (batch, heads, queries, keys)
    if full.dim() != 4 or any(found not in (1, size) for found, size in zip(full.shape, sizes, strict=True)):
        raise ValueError(
            f"mask must be [Lq, Lk], [B, Lq, Lk], [B, H, Lq, Lk] or bool [B, Lk] for B, H, Lq, Lk = {list(sizes)}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return full


def _added(q: Tensor, k: Tensor, call: Call, start: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """Bias, mask and causality as one term to add to the scores, and the queries that see no key, [..., Lq, 1].

    q holds the queries of the call from number `start` on. Either result is None where nothing of its kind applies.
    """
    bias, mask = call.bias, call.mask
    if bias is not None and bias.dtype != q.dtype:
        bias = bias.to(q.dtype)
    if bias is not None and bias.dim() not in (2, 4):  # torch's kernels take no other number of axes
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if mask is None and not call.causal:
        return bias, None
    total = q.new_zeros(()) if bias is None else bias
    hidden = q.new_full((), -math.inf)
    if mask is not None:
        total = torch.where(mask, total, hidden) if mask.dtype == torch.bool else total + mask.to(q.dtype)
    if call.causal:
        rows = torch.arange(start, start + q.shape[-2], device=q.device)
        total = torch.where(torch.arange(k.shape[-2], device=q.device) <= rows[:, None], total, hidden)
    if mask is None:
        return total, None
    # For a query that sees no key, the softmax would be 0/0: its scores are replaced here, and its output is zeroed later.
    blind = (total == -math.inf).all(dim=-1, keepdim=True)
    return total.masked_fill(blind, 0.0), blind


def _cleared(out: Tensor, blind: Tensor | None) -> Tensor:
    return out if blind is None else out.masked_fill(blind, 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    if call.causal and not call.terms:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=call.dropout, is_causal=True)
    added, blind = _added(q, k, call)
    if added is not None and added.requires_grad and not torch.is_grad_enabled():
        added = added.detach()  # the flash kernel refuses a bias that requires a gradient, even under no_grad
    return _cleared(F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=call.dropout), blind)


def _flash(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v, call)


def _standard(q: Tensor, k: Tensor, v: Tensor, call: Call, start: int = 0) -> Tensor:
    added, blind = _added(q, k, call, start)
    # q is scaled before the product, because in float16 the unscaled products could overflow.
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  # [B, H, Lq, Lk]
    if added is not None:
        scores = scores + added
    weights = torch.softmax(scores, dim=-1)
    if call.dropout > 0:
        weights = F.dropout(weights, call.dropout)
    return _cleared(weights @ v, blind)


def tracked(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether autograd records the call for a backward pass."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, *call.terms))


def _rows(term: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The part of a bias or mask that belongs to the queries from `start` to `stop`."""
    return term if term is None or term.dim() < 2 or term.shape[-2] == 1 else term[..., start:stop, :]


def _chunked(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    # Where gradients are needed, the backward pass computes each chunk again. If the forward pass kept the chunks' scores
    # instead, they would add up to the whole score matrix.
    learned = tracked(q, k, v, call)
    outputs = []
    for start in range(0, q.shape[-2], call.chunk_size):
        stop = start + call.chunk_size
        part = dataclasses.replace(call, bias=_rows(call.bias, start, stop), mask=_rows(call.mask, start, stop))
        arguments = (q[..., start:stop, :], k, v, part, start)
        outputs.append(checkpoint(_standard, *arguments, use_reentrant=False) if learned else _standard(*arguments))
    return torch.cat(outputs, dim=-2)


def _sage_kernel() -> Callable[..., Tensor]:
    try:
        kernel: Callable[..., Tensor] = importlib.import_module("sageattention").sageattn
    except ImportError as error:
        raise ImportError(
            f'Please install "sageattention"\nhint: pip install sageattention, or choose another attention backend and unset {SAGE_SWITCH}'
        ) from error
    return kernel


def _sage(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    return _sage_kernel()(q, k, v, tensor_layout="HND", is_causal=call.causal)


def _takes_all(_q: Tensor, _k: Tensor, _v: Tensor, _call: Call) -> str | None:
    return None


def flash_refusal(q: Tensor, _k: Tensor, v: Tensor, call: Call) -> str | None:
    """Why torch's flash kernel on q's device cannot take the call, or None when it can."""
    if q.shape[-1] != v.shape[-1]:
        return f"values of the queries' head size {q.shape[-1]}, got {v.shape[-1]}"
    if q.device.type == "cpu":
        if call.dropout > 0:
            return f"no dropout on the CPU, got {call.dropout}"
        learned = torch.is_grad_enabled() and any(term.requires_grad for term in call.terms)
        return "a bias and mask that need no gradient" if learned else None
    if q.device.type != "cuda":
        return f"tensors on cpu or cuda, got {q.device.type}"
    if q.dtype not in _HALVES:
        return f"float16 or bfloat16 on CUDA, got {q.dtype}"
    if q.shape[-1] > 256:
        return f"heads of at most 256 on CUDA, got {q.shape[-1]}"
    return "neither bias nor mask on CUDA" if call.terms else None


def fused(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether `sdpa` has a fused kernel for the call, which never holds the scores of all queries.

    On CUDA the memory-efficient kernel takes every dtype but float64. On the CPU there is only the flash kernel.
    """
    return flash_refusal(q, k, v, call) is None or (q.device.type == "cuda" and q.dtype != torch.float64)


def _sage_refusal(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    try:
        _sage_kernel()
    except ImportError as error:
        return f"its package: {str(error).splitlines()[0]}"
    if call.terms or call.dropout > 0:
        return "no bias, mask or dropout"
    if q.device.type != "cuda" or q.dtype not in _HALVES:
        return f"float16 or bfloat16 on CUDA, got {q.dtype} on {q.device.type}"
    if q.shape[-1] not in (64, 96, 128):
        return f"heads of 64, 96 or 128, got {q.shape[-1]}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return "tensors that need no gradient"
    return None


BACKENDS: Mapping[str, Backend] = {
    "sdpa": Backend(_sdpa, _takes_all),
    "flash": Backend(_flash, flash_refusal),
    "chunked": Backend(_chunked, _takes_all),
    "standard": Backend(_standard, _takes_all),
    "sage": Backend(_sage, _sage_refusal),
}
