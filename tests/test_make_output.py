"""What make prints: what a person needs to see, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# Stands for pip and python: it says what a real pip would say of a download, unless it was told to be quiet.
FAKE = """#!/bin/sh
case "$*" in *torchvision*|*typings*|*hy3dgen*) ;; *--quiet*) ;; *) echo "Downloading torch.whl (190.1 MB)" ;; esac
"""


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
    for name in ("python", "pip", "hunyuan3d-export"):
        program = tmp_path / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(FAKE)
        program.chmod(0o755)
    stubs = tmp_path / ".venv" / "typings" / "tensorrt_bindings" / "tensorrt.pyi"
    stubs.parent.mkdir(parents=True)
    stubs.write_text("")
    return tmp_path


def make(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=tree, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_setup_shows_that_it_downloads_and_how_much(tree: Path) -> None:
    said = make(tree, "setup")
    assert "installs into .venv: 2.4 GB on disk" in said and said.count("Downloading torch.whl (190.1 MB)") == 1


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_export_engine_echoes_no_condition(target: str, tree: Path) -> None:
    make(tree, "setup")
    lines = make(tree, "export-engine", f"TARGET={target}").splitlines()
    commands = [line.split()[:2] for line in lines if "hunyuan3d-export" in line]
    deploys = [[".venv/bin/hunyuan3d-export", "deploy"]] if target == "tensorrt" else []
    assert commands == [[".venv/bin/hunyuan3d-export", "engine"], *deploys] and "test " not in "\n".join(lines)
