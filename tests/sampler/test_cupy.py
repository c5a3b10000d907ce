"""The real CuPy as the GPU server's image installs it, on a machine without a GPU and as a user who can write almost nowhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device_arrays
import pytest

pytestmark = pytest.mark.slow

NOBODY = 1000
UNWRITABLE = "/nonexistent"


@pytest.fixture(scope="module")
def versions(root: Path) -> dict[str, str]:
    lines = (root / "docker" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def folder(root: Path, versions: dict[str, str]) -> Iterator[Path]:
    """CuPy and NumPy in the image's versions beside the sampler's code, readable for every user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        pins = [f"cupy-cuda13x=={versions['CUPY_VERSION']}", f"numpy=={versions['GPU_NUMPY_VERSION']}"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--only-binary",
            ":all:",
            "--target",
            str(folder / "site"),
        ]
        done = subprocess.run([*command, *pins], capture_output=True, text=True, timeout=500)
        if done.returncode:
            pytest.skip(f"pip cannot install {' '.join(pins)} here: {done.stderr.strip().splitlines()[-1]}")
        shutil.copytree(root / "model_repository" / "hunyuan3d_sampler" / "1", folder / "code")
        shutil.copy(Path(__file__).parent / "real_cupy.py", folder / "code")
        yield folder


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter of this version that the other user may run: root's own may lie where nobody else can look."""
    candidates = [sys.executable] if os.getuid() else [sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"]
    for candidate in candidates:
        try:
            version = as_nobody(candidate, "-c", "import sys; print(*sys.version_info[:2])")
        except (OSError, subprocess.CalledProcessError):
            continue
        if version.split() == [str(part) for part in sys.version_info[:2]]:
            return candidate
    pytest.skip(f"user {NOBODY} can run no Python of this version here")


def as_nobody(*command: str, **environment: str) -> str:
    """The output of a command that user 1000 runs (or the present user, unless that is root)."""
    user: dict[str, Any] = {} if os.getuid() else {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    variables = {"PATH": os.environ["PATH"], "HOME": UNWRITABLE, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=variables, cwd="/", **user)
    return done.stdout


def outcome(python: str, folder: Path, **environment: str) -> dict[str, Any]:
    path = f"{folder / 'site'}:{folder / 'code'}"
    return json.loads(as_nobody(python, str(folder / "code" / "real_cupy.py"), PYTHONPATH=path, **environment))


def test_without_a_cache_folder_cupy_fails_at_import_and_numpy_steps(python: str, folder: Path) -> None:
    found = outcome(python, folder)
    assert found["uid"] == (os.getuid() or NOBODY)
    assert found["error"] == "PermissionError", "CuPy makes its cache folder below HOME"
    (message,) = found["messages"]
    assert message.startswith("WARNING CuPy cannot be used, so the states of samples are NumPy arrays: PermissionError: ")
    assert UNWRITABLE in message and not found["on_gpu"]


@pytest.fixture(scope="module")
def imported(python: str, folder: Path) -> dict[str, Any]:
    """What CuPy says with the image's CUPY_CACHE_DIR in a temporary folder that everybody may write."""
    temporary = folder / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    found = outcome(python, folder, CUPY_CACHE_DIR=str(temporary / "cupy"))
    assert (temporary / "cupy").is_dir()
    return found


def test_with_a_cache_folder_cupy_is_imported(imported: dict[str, Any], versions: dict[str, str]) -> None:
    assert "error" not in imported and imported["version"] == versions["CUPY_VERSION"]
    if not imported["on_gpu"]:
        (message,) = imported["messages"]
        assert message.startswith("WARNING CuPy cannot be used") and "PermissionError" not in message


def test_the_stand_in_knows_the_names_of_the_real_module(imported: dict[str, Any], versions: dict[str, str]) -> None:
    assert device_arrays.NAMES["version"] == versions["CUPY_VERSION"]
    assert set(imported["functions"]) == device_arrays.FUNCTIONS
    # Some members depend on the interpreter's version, as __getstate__ does.
    assert {name for name in imported["ndarray"] if not name.startswith("__")} == {
        name for name in device_arrays.MEMBERS if not name.startswith("__")
    }
