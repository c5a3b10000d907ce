"""Attention in two forms: attention(), a function over projected heads, and EfficientAttention, a whole module."""

from .function import BACKENDS, CHUNK_SIZE, Backend, Call, attention, resolve_backend
from .memory import PeakMemory, estimate_bytes
from .module import FALLBACKS, EfficientAttention

__all__ = [
    "BACKENDS",
    "CHUNK_SIZE",
    "FALLBACKS",
    "Backend",
    "Call",
    "EfficientAttention",
    "PeakMemory",
    "attention",
    "estimate_bytes",
    "resolve_backend",
]
