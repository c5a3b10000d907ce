"""The Blender add-on of upstream, supplied from outside, against the gateway, in Blender itself.

BLENDER_ADDON names the add-on's file, BPY_PYTHON a Python that has the packages bpy and requests (pip install bpy requests).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gateway_doubles import picture
from test_page import running

ADDON, PYTHON = os.environ.get("BLENDER_ADDON"), os.environ.get("BPY_PYTHON")
DRIVER = Path(__file__).parent / "blender_driver.py"


@pytest.mark.slow
@pytest.mark.skipif(not (ADDON and PYTHON), reason="no Blender add-on was supplied: BLENDER_ADDON=FILE BPY_PYTHON=PYTHON")
def test_the_add_on_gets_a_mesh_and_shows_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "chair.png").write_bytes(picture())
    with running(tmp_path, 0.2) as url:
        made, refused = (run(url, tmp_path / "chair.png", texture) for texture in ("plain", "texture"))
    assert made["meshes"] == [12] and not made["processing"]
    assert not [text for kind, text in made["reported"] if kind == "ERROR"]
    (error,) = [text for kind, text in refused["reported"] if kind == "ERROR"]
    assert "without textures" in error and refused["meshes"] == []


def run(url: str, path: Path, texture: str) -> dict[str, Any]:
    command = [str(PYTHON), str(DRIVER), str(ADDON), url, str(path), texture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found
