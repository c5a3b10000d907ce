"""The old import path of hunyuan3d_export.attention.EfficientAttention, kept for code that uses it."""

from ..attention import EfficientAttention as EfficientAttention
