"""The Python runtimes' entry: the code of hunyuan3d_dit, which this model's folder stands beside, with its own graph."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "hunyuan3d_dit" / "1"))

from denoiser_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
