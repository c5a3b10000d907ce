"""The demo's comparison of a served mesh with torch's field: it passes for the right mesh and sees a wrong one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import trimesh
from surface import extract

from hunyuan3d_client import Mesh
from hunyuan3d_export.commands import demo_mesh
from hunyuan3d_export.shapevae.weights import ShapeVAESource

WEIGHTS = ShapeVAESource(preset="tiny", seed=5)
RESOLUTION = 16
CELL = 2.02 / RESOLUTION
LATENTS = np.random.default_rng(0).standard_normal((1, 12, 64)).astype(np.float32)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_mesh, "RESOLUTION", RESOLUTION)


@pytest.fixture(scope="module")
def right() -> trimesh.Trimesh:
    """The mesh of torch's field as the server makes it: closed where it runs through the box."""
    decoder = WEIGHTS.load(torch.float32)
    with torch.no_grad():
        shape = decoder.keys_values(torch.from_numpy(LATENTS) / WEIGHTS.serving().scale_factor)
        asking = extract(RESOLUTION, method="dense")
        queries = next(asking)
        try:
            while True:
                queries = asking.send(decoder.field(torch.from_numpy(queries)[None], *shape)[0].numpy())
        except StopIteration as end:
            return trimesh.Trimesh(end.value.vertices, end.value.faces, process=False)


def error(mesh: trimesh.Trimesh) -> float:
    data: bytes = mesh.export(file_type="ply")
    return demo_mesh.error_in_cells(Mesh(data=data, format="ply", statistics={}), LATENTS, WEIGHTS)


def test_the_right_mesh_passes(right: trimesh.Trimesh) -> None:
    assert np.abs(right.vertices).max() > 1.0, "this surface runs through the box, where scikit-image leaves it open"
    assert error(right) < demo_mesh.TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        lambda mesh: mesh.apply_translation([0.1 * CELL, 0, 0]),
        lambda mesh: mesh.apply_scale(RESOLUTION / (RESOLUTION + 1)),
        lambda mesh: mesh.submesh([range(len(mesh.faces) // 2)], append=True),
        lambda mesh: trimesh.util.concatenate(
            mesh, trimesh.creation.icosphere(radius=CELL / 8).apply_translation([3 * CELL] * 3)
        ),
    ],
    ids=["moved", "shrunken", "half", "a floater"],
)
def test_a_wrong_mesh_is_seen(change: Callable[[trimesh.Trimesh], trimesh.Trimesh], right: trimesh.Trimesh) -> None:
    assert error(change(right.copy())) > demo_mesh.TOLERANCE
