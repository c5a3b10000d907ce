"""The tiny encoder, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx


@pytest.fixture(scope="session")
def exported(root: Path) -> Callable[..., Path]:
    """exported(precision="fp32", attention="op", **source): the folder that holds hunyuan3d_conditioner/."""

    def export(*, precision: str = "fp32", attention: str = "op", **source: int) -> Path:
        name = "-".join(map(str, ["conditioner", precision, attention, *source.values()]))
        options = OnnxOptions(precision=precision, attention=attention)
        return export_onnx(ConditionerSource(**source), root / "build" / "test" / name, options=options)[0].parent

    return export
