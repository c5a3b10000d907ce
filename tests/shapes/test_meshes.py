"""Exact fields give meshes whose metrics are perfect but for the grid; each defect of a mesh shows in its own metric."""

import dataclasses

import numpy as np
import pytest

from hunyuan3d_export.shapes import PROMPTS, solid
from hunyuan3d_export.shapes.decoding import mesh_of
from hunyuan3d_export.shapes.meshes import BOUNDS, Triangles, distance_to_mesh, judged_topology, measure_mesh
from hunyuan3d_export.shapes.solids import Pair, Topology, signed_distance

RESOLUTION = 64
# One of each kind of surface, one with a hole, two parts, and a prompt whose parts touch.
SOLIDS = ("sphere", "flat torus", "tetrahedron", "two tall cones", "two tori")


def field_of(prompt):
    return lambda points: np.clip(16 * signed_distance(solid(prompt), points), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def meshes():
    return {prompt: mesh_of(field_of(prompt), RESOLUTION) for prompt in SOLIDS}


@pytest.mark.parametrize("prompt", SOLIDS)
def test_the_mesh_of_an_exact_field_is_the_solid(meshes, prompt):
    values = measure_mesh(meshes[prompt], prompt)
    assert values["to_surface"] < 0.001 and values["from_surface"] < 0.003 and values["volume"] < 0.03
    assert values["watertight"] == 1
    assert values.get("topology", 1) == 1


@pytest.mark.parametrize("prompt", ["torus", "flat cylinder"])
def test_only_points_near_the_surface_are_evaluated(prompt):
    asked = []

    def field(points):
        asked.append(len(points))
        return field_of(prompt)(points)

    sparse = mesh_of(field, RESOLUTION)
    assert sum(asked) < 0.6 * (RESOLUTION + 1) ** 3
    from skimage.measure import marching_cubes

    line = np.linspace(-BOUNDS, BOUNDS, RESOLUTION + 1)
    dense = field_of(prompt)(np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3))
    vertices, faces, *_ = marching_cubes(dense.reshape((RESOLUTION + 1,) * 3), 0.0)
    assert len(faces) == len(sparse.faces)
    np.testing.assert_allclose(sparse.vertices, vertices * 2 * BOUNDS / RESOLUTION - BOUNDS, atol=1e-4)


@pytest.mark.parametrize("value", [-1.0, 1.0, np.nan])
def test_a_field_without_a_surface_has_no_mesh(value):
    assert mesh_of(lambda points: np.full(len(points), value, np.float32), 32) is None
    values = measure_mesh(None, "cube")
    assert values["to_surface"] == np.inf and values["watertight"] == values["topology"] == 0


def test_the_resolution_is_checked():
    with pytest.raises(ValueError, match="resolution must be a multiple of 32, got 48"):
        mesh_of(field_of("cube"), 48)


def test_each_defect_has_its_metric(meshes):
    good = meshes["flat torus"]
    sound = measure_mesh(good, "flat torus")
    open_mesh = measure_mesh(dataclasses.replace(good, faces=good.faces[1:]), "flat torus")
    assert open_mesh["watertight"] == 0
    inverted = measure_mesh(dataclasses.replace(good, faces=good.faces[:, ::-1]), "flat torus")
    assert inverted["volume"] == pytest.approx(2, abs=0.05)
    small = measure_mesh(dataclasses.replace(good, vertices=0.9 * good.vertices), "flat torus")
    assert small["volume"] > 0.2 and small["to_surface"] > 10 * sound["to_surface"]
    # A part of the surface fits everywhere it is, so only the way back finds the missing part.
    half = dataclasses.replace(good, faces=good.faces[(good.vertices[good.faces[:, 0], 0] > 0)])
    assert measure_mesh(half, "flat torus")["from_surface"] > 20 * sound["from_surface"]
    speck = meshes["tetrahedron"]
    both = Triangles(
        np.concatenate([good.vertices, 0.01 * speck.vertices]), np.concatenate([good.faces, speck.faces + len(good.vertices)])
    )
    assert both.topology() == Topology(2, 2) and measure_mesh(both, "flat torus")["topology"] == 0


def test_the_distance_to_a_mesh_is_that_to_its_triangles():
    square = Triangles(np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]), np.array([[0, 1, 2], [0, 2, 3]]))
    points = np.array([[0.5, 0.25, 0.3], [2.0, 0.5, 0.0], [-1.0, -1.0, 0.0], [0.2, 0.9, 0.0]])
    np.testing.assert_allclose(distance_to_mesh(points, square), [0.3, 1.0, 2**0.5, 0.0], atol=1e-12)


def test_copies_that_touch_are_not_judged():
    touching = {prompt for prompt in PROMPTS if not judged_topology(prompt)}
    pairs = {"spheres", "flat spheres", "tori", "flat tori", "tall tori", "octahedra", "flat octahedra"}
    assert touching == {f"two {pair}" for pair in pairs}
    assert isinstance(solid("two cubes"), Pair) and judged_topology("two cubes")
