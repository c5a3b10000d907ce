"""The old import path of hunyuan3d_export.attention, kept for code that uses it."""

from ..attention import *  # noqa: F403
