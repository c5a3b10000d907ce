"""Where attention can be imported from, and what the package itself imports."""

from __future__ import annotations

import subprocess
import sys

import hunyuan3d_export.dit.attention as old_function
import hunyuan3d_export.dit.efficient_attention as old_module
from hunyuan3d_export import attention, dit


def test_old_paths_lead_to_the_same_objects() -> None:
    assert all(getattr(old_function, name) is getattr(attention, name) for name in attention.__all__)
    assert old_module.EfficientAttention is dit.EfficientAttention is attention.EfficientAttention


def test_the_package_does_not_import_the_network() -> None:
    script = "import sys, hunyuan3d_export.attention; print([name for name in sys.modules if name.startswith('hunyuan3d_export.dit')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
