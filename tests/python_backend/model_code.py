"""The code of a served model, loaded on top of the stand-in for Triton's Python backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[2] / "model_repository"


def load_model(name: str) -> ModuleType:
    """A new copy of the module model_repository/NAME/1/model.py: all models have files of that name."""
    spec = importlib.util.spec_from_file_location(f"{name}_model", REPOSITORY / name / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
