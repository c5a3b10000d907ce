"""EfficientAttention, a module with projections and dropout that chooses a backend for each call and falls back to others."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

from einops import rearrange
from torch import Tensor, nn

from .function import (
    BACKENDS,
    CHUNK_SIZE,
    SAGE_SWITCH,
    Call,
    flash_refusal,
    four_axes,
    fused,
    known_backend,
    log_once,
    require_backend,
    sage_wanted,
)
from .memory import PeakMemory, estimate_bytes

AUTO = "auto"
# When a backend fails, the next in this order tries the call. Each is slower than the one before and needs less memory, down to
# `chunked`. `standard` comes last, because it makes the fewest demands on the call; a call that starts with `standard` goes on
# with `chunked`.
FALLBACKS = ("sage", "flash", "sdpa", "chunked", "standard")
SMALLEST_CHUNK = 32
# `auto` lets no more scores of a head exist at a time than those of chunk_size queries and this many keys.
KEYS_PER_CHUNK = 8192
_MIB = 2**20
_logger = logging.getLogger(__name__)


class EfficientAttention(nn.Module):
    """Multi-head attention of a sequence to itself or to another sequence.

    The projections to_q, to_k and to_v have no bias; to_out is a Linear and a Dropout. `dropout` is the probability of
    dropping an attention weight, and also that of dropping an output; it applies in training only.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_head: int,
        dropout: float = 0.0,
        chunk_size: int = CHUNK_SIZE,
        backend: str = AUTO,
        *,
        d_context: int | None = None,
        fall_back: bool = True,
        monitor_memory: bool = False,
        attention_bias: object = None,
    ) -> None:
        """d_context is the width of key and value (None: d_model).

        backend: `auto` chooses for each call (see choose()), and prefers `sage` where USE_SAGEATTN=1, which is read here, once.
        fall_back: when a backend refuses a call, is missing or runs out of memory in the forward pass, the next of FALLBACKS
        tries the call. Each reason is logged once.
        monitor_memory: log each call's estimated and measured memory at level INFO.
        attention_bias: must stay None. Here a bias belongs to a call and is called `bias`; the error says so to those who
        come with the name of other attention modules.

        Raises ValueError for a size below 1, a dropout outside [0, 1), an unknown backend or an attention_bias, and ImportError
        for the backend `sage` without its package, unless fall_back is set.
        """
        super().__init__()
        _check_no_bias(attention_bias)
        d_context = d_model if d_context is None else d_context
        _check_sizes(d_model=d_model, num_heads=num_heads, d_head=d_head, d_context=d_context)
        Call(None, None, False, dropout, chunk_size)  # checks dropout and chunk_size now rather than at the first call
        _check_backend(backend, fall_back=fall_back)
        self.num_heads, self.dropout, self.chunk_size = num_heads, dropout, chunk_size
        self.backend, self.fall_back, self.monitor_memory = backend, fall_back, monitor_memory
        self.prefer_sage = backend == AUTO and _sage_preferred()
        inner = num_heads * d_head
        self.to_q = nn.Linear(d_model, inner, bias=False)
        self.to_k = nn.Linear(d_context, inner, bias=False)
        self.to_v = nn.Linear(d_context, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, d_model), nn.Dropout(dropout))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """query [B, Lq, d_model], key and value [B, Lk, d_context] -> [B, Lq, d_model].

        Without a key, the query is the key; without a value, the key is the value. mask, bias and causal as in attention().

        Raises ValueError for a value without a key, a mask or bias that does not fit, and, unless fall_back is set, for a
        call that the backend refuses.
        """
        if key is None and value is not None:
            raise ValueError("key must be given with value, got None")
        key = query if key is None else key
        value = key if value is None else value
        if not (query.shape[0] == key.shape[0] and key.shape[:2] == value.shape[:2]):
            shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
            raise ValueError(f"query, key and value must be [B, Lq, ..], [B, Lk, ..], [B, Lk, ..], got {shapes}")
        projected = (self.to_q(query), self.to_k(key), self.to_v(value))
        q, k, v = (rearrange(x, "B L (H D) -> B H L D", H=self.num_heads) for x in projected)
        dropout = self.dropout if self.training else 0.0
        call = Call(bias, None if mask is None else four_axes(mask, q, k), causal, dropout, self.chunk_size)
        _check_bias(bias, q, k)
        return self.to_out(rearrange(self._attend(q, k, v, call), "B H L D -> B L (H D)"))

    def choose(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> str:
        """The backend that `auto` stands for in this call.

        On CUDA: `flash` in half precision without mask and bias, else `sdpa`, whose memory-efficient kernel takes every dtype
        but float64. On the CPU: `sdpa`, whose flash kernel takes masks, but neither dropout nor a bias that learns. Where a mask
        is so large that `sdpa` would need more than twice the memory of `chunked`, `chunked`. Calls that no fused kernel takes
        go to `chunked` where a head has more than chunk_size x chunk_size scores, and to `standard` below.
        """
        if self.prefer_sage and BACKENDS["sage"].refusal(q, k, v, call) is None:
            return "sage"
        if not fused(q, k, v, call):
            return "chunked" if q.shape[-2] * k.shape[-2] > self.chunk_size**2 else "standard"
        chunks = dataclasses.replace(call, chunk_size=self._first_chunk(k))
        if estimate_bytes("sdpa", q, k, v, call) > 2 * estimate_bytes("chunked", q, k, v, chunks):
            return "chunked"
        return "flash" if q.device.type == "cuda" and flash_refusal(q, k, v, call) is None else "sdpa"

    def _first_chunk(self, k: Tensor) -> int:
        """The chunk that a call starts with: chunk_size, which `auto` halves while the keys are too many for it."""
        chunk_size = self.chunk_size
        while (
            self.backend == AUTO
            and chunk_size // 2 >= SMALLEST_CHUNK
            and chunk_size * k.shape[-2] > self.chunk_size * KEYS_PER_CHUNK
        ):
            chunk_size //= 2
        return chunk_size

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        first = self.choose(q, k, v, call) if self.backend == AUTO else self.backend
        chunk_size = self._first_chunk(k)
        if not self.fall_back:
            reason = BACKENDS[first].refusal(q, k, v, call)
            if reason is not None:
                raise ValueError(f"attention backend {first} must get {reason}\nhint: fall_back=True, or backend='auto'")
            return self._run(first, chunk_size, q, k, v, call)
        attempts = list(_attempts(first, chunk_size))
        for (name, chunk_size), following in zip(attempts, attempts[1:], strict=False):
            reason = BACKENDS[name].refusal(q, k, v, call)
            if reason is None:
                try:
                    return self._run(name, chunk_size, q, k, v, call)
                except (RuntimeError, MemoryError) as error:  # no kernel or no memory: the next backend may need less
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                reason = f"it must get {reason}"
            log_once(_logger, f"attention falls back from {_label(name, chunk_size)} to {_label(*following)}: {reason}")
        return self._run(*attempts[-1], q, k, v, call)

    def _run(self, name: str, chunk_size: int, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        call = dataclasses.replace(call, chunk_size=chunk_size)
        if not self.monitor_memory:
            return BACKENDS[name].run(q, k, v, call)
        estimated = estimate_bytes(name, q, k, v, call) / _MIB
        with PeakMemory(q.device) as peak:
            out = BACKENDS[name].run(q, k, v, call)
        measured = "unknown" if peak.bytes is None else f"{peak.bytes / _MIB:.1f} MiB"
        shape = f"{q.shape[-2]} queries, {k.shape[-2]} keys"
        _logger.info("attention %s, %s: estimated %.1f MiB, peak %s", _label(name, chunk_size), shape, estimated, measured)
        return out


def _check_no_bias(attention_bias: object) -> None:
    if attention_bias is not None:
        raise ValueError(
            f"attention_bias must be given to a call, got {type(attention_bias).__name__} in the constructor\n"
            "hint: layer(query, bias=...) adds it to the scores; to_q, to_k and to_v have no bias"
        )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_backend(backend: str, *, fall_back: bool) -> None:
    known_backend(backend, AUTO)
    if not fall_back:
        require_backend(backend)


def _sage_preferred() -> bool:
    """Whether USE_SAGEATTN is 1. Logs once when it is, but the package is missing, so that it will have no effect."""
    preferred = sage_wanted()
    if preferred:
        try:
            require_backend("sage")
        except ImportError as error:
            log_once(_logger, f"attention does without sage, although {SAGE_SWITCH} is 1: {str(error).splitlines()[0]}")
    return preferred


def _attempts(first: str, chunk_size: int) -> Iterator[tuple[str, int]]:
    """The backends to try, in order, each with its chunk size."""
    for name in ("standard", "chunked") if first == "standard" else FALLBACKS[FALLBACKS.index(first) :]:
        yield name, chunk_size
        smaller = chunk_size // 2
        while name == "chunked" and smaller >= SMALLEST_CHUNK:
            yield name, smaller
            smaller //= 2


def _check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    full = (*q.shape[:3], k.shape[2])
    if bias is None:
        return
    if bias.dim() > 4 or any(found not in (1, size) for found, size in zip(reversed(bias.shape), reversed(full), strict=False)):
        raise ValueError(f"bias must broadcast to [B, H, Lq, Lk] = {list(full)}, got {list(bias.shape)}")


def _label(name: str, chunk_size: int) -> str:
    return f"{name}({chunk_size})" if name == "chunked" else name
