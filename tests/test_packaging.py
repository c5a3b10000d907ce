"""A plain `pip install .` gives a client that needs nothing but NumPy and tritonclient."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

# Every package that the extras bring. The import of any of them fails with its name.
BLOCKED = (
    "torch", "einops", "onnx", "onnxscript", "onnxruntime", "safetensors", "tensorrt", "tensorrt_rtx", "cupy", "pytriton",
    "typer", "rich", "matplotlib", "scipy", "skimage", "PIL", "trimesh", "fastapi", "sqlalchemy", "hunyuan3d_export",
    "hunyuan3d_gateway",
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


@pytest.mark.parametrize(
    ("package", "argument", "extra"),
    [("hunyuan3d_client", "--help", "cli"), ("hunyuan3d_export", "onnx", "export"), ("hunyuan3d_gateway", "--help", "gateway")],
)
def test_a_command_without_its_extra_says_what_to_install(package: str, argument: str, extra: str) -> None:
    code = f"import runpy; sys.argv = ['command', '{argument}']; sys.modules.pop('{package}', None)\n"
    blocked = PRELUDE.replace("'hunyuan3d_export'", "'nothing'").replace("'hunyuan3d_gateway'", "'nothing'")
    found = subprocess.run(
        [sys.executable, "-c", blocked + code + f"runpy.run_module('{package}', run_name='__main__')"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode != 0 and f"pip install --constraint constraints.txt '.[{extra}]'" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def test_requirements_of_a_plain_install() -> None:
    requirements = importlib.metadata.requires("hunyuan3d-triton") or []
    plain = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert {requirement.split(">")[0].split("[")[0] for requirement in plain} == {"numpy", "tritonclient"}


def extras(root: Path) -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return dict(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def resolved(root: Path, *names: str) -> set[str]:
    """The distributions that these extras of the project bring, those of the extras inside them included."""
    known, todo, found = extras(root), list(names), set()
    while todo:
        for text in known[todo.pop()]:
            requirement = Requirement(text)
            if requirement.name == "hunyuan3d-triton":
                todo += requirement.extras
            else:
                found.add(requirement.name)
    return found


ADDED = ("cli", "rtx", "embedded", "mesh", "conditioner", "shapes", "gateway", "browser", "test", "dev")


def test_an_environment_gets_one_onnx_runtime(root: Path) -> None:
    """onnxruntime and onnxruntime-gpu share a package folder, and an environment with both loses CUDA."""
    assert {*ADDED, "export-base", "export", "gpu"} == set(extras(root)), "every extra is in this test"
    for chosen, runtime in (("export", "onnxruntime"), ("gpu", "onnxruntime-gpu")):
        everything = resolved(root, chosen, *ADDED)
        assert {name for name in everything if name.startswith("onnxruntime")} == {runtime}
        assert resolved(root, chosen) >= {"torch", "onnx", "onnxscript", "einops", "typer"}
    assert "tensorrt" in resolved(root, "gpu") and "tensorrt" not in resolved(root, "export", *ADDED)


def test_setup_gpu_exchanges_the_onnx_runtime_and_setup_keeps_it(root: Path, tmp_path: Path) -> None:
    """The Makefile itself, with a pip that only writes down what it is asked for."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    stubs = tmp_path / ".venv" / "typings" / "tensorrt_bindings" / "tensorrt.pyi"
    for path, text in {".venv/bin/python": "", ".venv/bin/pip": 'echo "$*" >> pip.log', stubs: ""}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / path).chmod(0o755)

    def asked(target: str) -> list[str]:
        (tmp_path / "pip.log").write_text("")
        subprocess.run(["make", "-s", target], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        return (tmp_path / "pip.log").read_text().splitlines()

    assert any("--constraint constraints.txt --editable .[dev,export]" in line for line in asked("setup"))
    subprocess.run(["make", "-n", "setup-gpu"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert not (tmp_path / ".venv" / ".gpu").exists(), "a dry run changes nothing"
    first, second, *_ = asked("setup-gpu")
    assert first == "uninstall --quiet --yes onnxruntime"
    assert second == "install --constraint constraints.txt --editable .[dev,gpu]"
    assert asked("setup") == [], "nothing has changed"
    (tmp_path / ".venv" / ".installed").unlink()
    assert ".[dev,gpu]" in asked("setup")[0]


def test_no_hint_names_a_package_that_no_index_has(root: Path) -> None:
    names = re.compile(r"pip install [^\n]*hunyuan3d-triton")
    folders = (
        "client",
        "export",
        "gateway",
        "model_repository",
        "docs",
        "docker",
        "examples",
        "README.md",
        "Makefile",
        "compose.yaml",
    )
    paths = [path for name in folders for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])]
    texts = {path: path.read_text() for path in paths if path.suffix in (".py", ".md", ".sh", ".yaml", ".Dockerfile", "")
             and path.is_file()}  # fmt: skip
    assert len(texts) > 100 and names.search('pip install "hunyuan3d-triton[gpu]"')
    assert [str(path) for path, text in texts.items() if names.search(text)] == []


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(root)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "hunyuan3d_client",
        "hunyuan3d_export",
        "hunyuan3d_gateway",
    }
    inside = {
        name.removeprefix("hunyuan3d_export/") for name in zipfile.ZipFile(wheel).namelist() if "model_repository/" in name
    }
    tracked = [*root.glob("model_repository/*/*.pbtxt"), *root.glob("model_repository/*/*/*.p*")]
    assert zipfile.ZipFile(wheel).read("hunyuan3d_export/versions.env") == (root / "docker" / "versions.env").read_bytes()
    assert inside == {str(path.relative_to(root)) for path in tracked if path.suffix in (".py", ".pbtxt")}
