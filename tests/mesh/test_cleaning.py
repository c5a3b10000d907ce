"""Floaters, simplification, and the figures of what is left."""

from __future__ import annotations

import numpy as np
import pytest
import topology
import trimesh
from cleaning import clean


def meshes(*sizes: int) -> tuple[np.ndarray, np.ndarray]:
    """Spheres of 20 * 4^size faces, side by side."""
    spheres = [trimesh.creation.icosphere(size) for size in sizes]
    for index, sphere in enumerate(spheres):
        sphere.apply_translation([3 * index, 0, 0])
    whole = trimesh.util.concatenate(spheres)
    return whole.vertices.astype(np.float32), whole.faces.astype(np.int32)


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    return float(trimesh.Trimesh(vertices, faces, process=False).volume)


@pytest.mark.parametrize(("keep", "components"), [(0.0, 3), (0.004, 2), (0.1, 1), (1.0, 1)])
def test_components_below_the_share_of_the_largest_are_removed(keep: float, components: int) -> None:
    vertices, faces = meshes(5, 2, 0)  # 20480, 320 and 20 faces: shares of 1/64 and 1/1024
    cleaned = clean(vertices, faces, keep=keep)
    assert (cleaned.components, cleaned.removed) == (components, 3 - components)
    assert cleaned.watertight and cleaned.faces.dtype == np.int32 and cleaned.vertices.dtype == np.float32
    assert len(np.unique(cleaned.faces)) == len(cleaned.vertices), "no vertex is left without a face"


def test_the_usual_share_removes_specks_only() -> None:
    assert clean(*meshes(5, 2, 0)).components == 2


def test_a_mesh_without_floaters_is_left_as_it_is() -> None:
    vertices, faces = meshes(3)
    cleaned = clean(vertices, faces, shape=topology.measure(faces, len(vertices)))
    assert cleaned.vertices is vertices and cleaned.faces is faces and cleaned.removed == 0


@pytest.mark.parametrize("max_faces", [100, 1000, 5000])
def test_faces_are_made_fewer_and_stay_outward(max_faces: int) -> None:
    vertices, faces = meshes(5)
    cleaned = clean(vertices, faces, max_faces=max_faces)
    assert 0.9 * max_faces <= len(cleaned.faces) <= 1.02 * max_faces
    assert volume(cleaned.vertices, cleaned.faces) == pytest.approx(4 / 3 * np.pi, rel=0.1)
    assert cleaned.watertight and cleaned.components == 1


def test_fewer_faces_than_allowed_are_left_alone() -> None:
    vertices, faces = meshes(2)
    assert clean(vertices, faces, max_faces=len(faces)).faces is faces


def test_an_open_mesh_is_said_to_be_open() -> None:
    vertices, faces = meshes(3, 2)
    assert not clean(vertices, faces[1:], keep=0).watertight
    doubled = np.concatenate([faces, faces[:1]])
    assert not clean(vertices, doubled, keep=0).watertight
    turned = np.concatenate([faces[1:], faces[:1, ::-1]])
    assert not clean(vertices, turned, keep=0).watertight, "a triangle with the wrong orientation counts as open"
    hole_in_floater = faces[:-1]
    assert clean(vertices, hole_in_floater, keep=0.5).watertight, "the floater with the hole is gone"


@pytest.mark.parametrize("options", [{"keep": -0.1}, {"keep": 1.1}, {"keep": float("nan")}, {"max_faces": 3}])
def test_wrong_arguments_are_errors_with_a_hint(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be .*, got .*\nhint: "):
        clean(*meshes(1), **options)  # type: ignore[arg-type]
