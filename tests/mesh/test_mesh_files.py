"""The files can be read by others: trimesh, the Khronos validator, and Blender."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import dense
import fields
import numpy as np
import pytest
import trimesh
from cleaning import clean
from mesh_files import FORMATS, encode
from surface import Surface

# An interpreter of an environment that has Blender as the package bpy; it wants a Python and a NumPy of its own.
BLENDER = "HUNYUAN3D_BLENDER_PYTHON"
_VALIDATE = """
const validator = require(process.argv[1]), files = require("fs");
validator.validateBytes(new Uint8Array(files.readFileSync(process.argv[2]))).then(report => console.log(JSON.stringify(report)));
"""
_IMPORT = """
import json, sys, bpy
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.import_scene.gltf(filepath=sys.argv[1])
(mesh,) = [thing for thing in bpy.data.objects if thing.type == "MESH"]
print("found", json.dumps([list(mesh.dimensions), len(mesh.data.polygons)]))
"""


@functools.cache
def surface(name: str, resolution: int = 63) -> Surface:
    return dense.drive(fields.chair(resolution) if name == "chair" else getattr(fields, name), resolution)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_holds_the_mesh(format: str) -> None:
    mesh = surface("box")
    content = encode(mesh.vertices, mesh.faces, format)
    loaded = trimesh.load_mesh(io.BytesIO(content), file_type=format)
    assert loaded.is_watertight and loaded.volume == pytest.approx(1.0 * 0.8 * 0.6, rel=0.01)
    assert len(loaded.faces) == len(mesh.faces)
    np.testing.assert_allclose(loaded.bounds, [mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)], atol=1e-6)


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"format must be one of glb, obj, stl, ply, got 'fbx'\nhint: "):
        encode(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]], np.int32), "fbx")


@pytest.fixture(scope="session")
def validator(root: Path) -> Path:
    """The npm package gltf-validator, in build/test."""
    if shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = root / "build" / "test" / "gltf-validator"
    if not (folder / "node_modules" / "gltf-validator").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "gltf-validator@2.0.0-dev.3.10"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip("npm cannot install gltf-validator here")
    return folder / "node_modules" / "gltf-validator"


def issues(validator: Path, content: bytes, folder: Path) -> dict[str, int]:
    """The validator's count of errors, warnings and hints."""
    path = folder / "mesh.glb"
    path.write_bytes(content)
    result = subprocess.run(["node", "-e", _VALIDATE, str(validator), str(path)], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)["issues"]
    return {kind: found[kind] for kind in ("numErrors", "numWarnings")}


@pytest.mark.slow
def test_the_validator_of_khronos_finds_no_error_in_ten_meshes(validator: Path, tmp_path: Path) -> None:
    meshes = [surface(name) for name in ("sphere", "box", "torus", "chair", "gyroid")]
    for mesh in meshes:
        for max_faces in (None, 1000):
            cleaned = clean(mesh.vertices, mesh.faces, max_faces=max_faces)
            found = issues(validator, encode(cleaned.vertices, cleaned.faces, "glb"), tmp_path)
            assert found == {"numErrors": 0, "numWarnings": 0}


@pytest.mark.slow
def test_the_validator_sees_errors(validator: Path, tmp_path: Path) -> None:
    mesh = surface("sphere")
    vertices = mesh.vertices.copy()
    vertices[5, 1] = np.inf
    assert issues(validator, encode(vertices, mesh.faces, "glb"), tmp_path)["numErrors"] > 0


@pytest.mark.slow
def test_blender_imports_a_mesh_with_its_dimensions(tmp_path: Path) -> None:
    if BLENDER not in os.environ:
        pytest.skip(f"{BLENDER} does not name the interpreter of an environment with Blender: pip install bpy in one")
    mesh = surface("box")
    path = tmp_path / "box.glb"
    path.write_bytes(encode(mesh.vertices, mesh.faces, "glb"))
    result = subprocess.run(
        [os.environ[BLENDER], "-c", _IMPORT, str(path)], capture_output=True, text=True, check=True, timeout=300
    )
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("found ")]
    dimensions, polygons = json.loads(line.removeprefix("found "))
    assert polygons == len(mesh.faces)
    np.testing.assert_allclose(dimensions, [1.0, 0.6, 0.8], atol=1e-3)  # glTF's y axis is up, Blender's is z
