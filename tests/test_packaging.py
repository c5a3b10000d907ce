"""A plain `pip install .` gives a client that needs nothing but NumPy and tritonclient."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Every package that the extras bring. The import of any of them fails with its name.
BLOCKED = (
    "torch", "einops", "onnx", "onnxscript", "onnxruntime", "safetensors", "tensorrt", "tensorrt_rtx", "cupy", "pytriton",
    "typer", "rich", "matplotlib", "scipy", "skimage", "PIL", "hunyuan3d_export",
)  # fmt: skip
PRELUDE = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_client_needs_none_of_the_extras() -> None:
    found = run("from hunyuan3d_client import AsyncClient, Client; Client('localhost:1').close(); print('works')")
    assert (found.returncode, found.stdout, found.stderr) == (0, "works\n", "")


def test_the_blocker_blocks() -> None:
    found = run("import torch")
    assert found.returncode == 1 and "torch is not installed" in found.stderr


def test_importing_has_no_effect(tmp_path: Path) -> None:
    code = "import hunyuan3d_client, threading, os; print(threading.active_count(), os.listdir())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert (found.stdout, found.stderr) == ("1 []\n", "")


@pytest.mark.parametrize(("package", "extra"), [("hunyuan3d_client", "cli"), ("hunyuan3d_export", "export")])
def test_a_command_without_its_extra_says_what_to_install(package: str, extra: str) -> None:
    code = f"import runpy; sys.argv = ['command', '--help']; sys.modules.pop('{package}', None)\n"
    blocked = PRELUDE.replace("'hunyuan3d_export'", "'nothing'")
    found = subprocess.run(
        [sys.executable, "-c", blocked + code + f"runpy.run_module('{package}', run_name='__main__')"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode != 0 and f'pip install "hunyuan3d-triton[{extra}]"' in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def test_requirements_of_a_plain_install() -> None:
    requirements = importlib.metadata.requires("hunyuan3d-triton") or []
    plain = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert {requirement.split(">")[0].split("[")[0] for requirement in plain} == {"numpy", "tritonclient"}


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(root)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hunyuan3d_client", "hunyuan3d_export"}
    inside = {
        name.removeprefix("hunyuan3d_export/") for name in zipfile.ZipFile(wheel).namelist() if "model_repository/" in name
    }
    tracked = [*root.glob("model_repository/*/*.pbtxt"), *root.glob("model_repository/*/*/*.p*")]
    assert inside == {str(path.relative_to(root)) for path in tracked if path.suffix in (".py", ".pbtxt")}
