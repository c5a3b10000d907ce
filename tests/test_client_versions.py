"""The client's own tests in fresh environments, with the oldest and the newest versions of the packages that it needs.

These tests install from the network, so all of them are slow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
# A Python version, and requirements for pip beside those of the package.
ENVIRONMENTS = [
    pytest.param(THIS, ["numpy>=2", "protobuf>=6"], id="newest"),
    pytest.param("3.13", ["numpy>=2", "protobuf>=6"], id="newest Python"),
    pytest.param("3.12", ["numpy==1.26.*", "protobuf==5.*"], id="protobuf 5"),
    pytest.param("3.10", ["numpy==1.26.0", "tritonclient==2.51.0"], id="oldest"),
]


def find_python(version: str) -> str | None:
    """An interpreter of `version`: this one, one on the path, or one of pyenv's, which the path may not reach."""
    known = [sys.executable] if version == THIS else [shutil.which(f"python{version}")]
    known += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    runs = (python for python in known if python and not subprocess.run([python, "-V"], capture_output=True).returncode)
    return next(runs, None)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "held"), ENVIRONMENTS)
def test_the_client_in_a_fresh_environment(version: str, held: list[str], root: Path, tmp_path: Path) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"needs Python {version}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(python, "-m", "venv", str(tmp_path))
    inside = str(tmp_path / "bin" / "python")
    run(inside, "-m", "pip", "install", "--quiet", f"{root}[cli]", *held, "pytest", "pytest-timeout", "hypothesis", "pillow")
    where = run(inside, "-c", "import hunyuan3d_client as h; print(h.__file__)")
    assert where.startswith(str(tmp_path)), "the installed package, not the checkout"
    run(inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/client")
