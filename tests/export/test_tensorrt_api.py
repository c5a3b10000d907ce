"""mypy checks calls of either TensorRT library against the stubs: a name that they do not have is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hunyuan3d_export.engines import api
from hunyuan3d_export.engines.targets import find_target

CODE = """
from pathlib import Path
from hunyuan3d_export.engines.targets import Target

def build(target: Target) -> None:
    trt = target.library
    builder = trt.Builder(trt.ILogger())
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.{flag})
    trt.OnnxParser(builder.create_network(), trt.ILogger()).{parse}("model.onnx")
    trt.Refitter(trt.Runtime(trt.ILogger()).deserialize_cuda_engine(b""), {logger}).refit_cuda_engine()
    {library}.SerializationFlag.EXCLUDE_WEIGHTS
"""
RIGHT = {"flag": "STRIP_PLAN", "parse": "parse_from_file", "logger": "trt.ILogger()", "library": "trt"}


WRONG = {"flag": "STRIP_PLANS", "parse": "parse_file", "logger": "builder", "library": "trt.Nothing"}
MESSAGES = (
    '"type[BuilderFlag]" has no attribute "STRIP_PLANS"',
    '"OnnxParser" has no attribute "parse_file"',
    'Argument 2 to "Refitter" has incompatible type "Builder"',
    '"TensorRT" has no attribute "Nothing"',
)


@pytest.mark.parametrize(("names", "messages"), [(RIGHT, ()), (WRONG, MESSAGES)], ids=["right", "wrong"])
def test_mypy_checks_calls_against_the_stubs(
    root: Path, tmp_path: Path, names: dict[str, str], messages: tuple[str, ...]
) -> None:
    code = tmp_path / "build.py"
    code.write_text(CODE.format(**names))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(code)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == bool(messages), found.stdout + found.stderr
    assert found.stdout.count(" error: ") == len(messages), found.stdout
    assert all(message in found.stdout for message in messages), found.stdout


def test_the_library_has_all_that_is_checked() -> None:
    library = find_target("tensorrt-rtx").library
    missing = [name for name in api._Classes.__annotations__ if not hasattr(library, name)]
    assert not missing
