"""Samplers lie on their surfaces, distances agree with brute force, every solid is of unit size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hunyuan3d_export.shapes import HELD_OUT, PROMPTS, TRAINED_PROMPTS, solid
from hunyuan3d_export.shapes.solids import signed_distance

SOME = (
    "sphere",
    "flat cube",
    "tall cone",
    "torus",
    "tetrahedron",
    "octahedron",
    "two flat cylinders",
    "helix",
    "two tall helices",
)


def random(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_samples_lie_on_the_surface_within_the_unit_ball(prompt):
    points = solid(prompt).sample(300, random())
    assert points.shape == (300, 3)
    assert solid(prompt).distance(points).max() < 1e-6
    assert np.linalg.norm(points, axis=-1).max() <= 1 + 1e-9
    assert solid(prompt).radius() == pytest.approx(1.0)


@pytest.mark.parametrize("prompt", SOME)
def test_distance_is_that_of_the_nearest_of_many_samples(prompt):
    spatial = pytest.importorskip("scipy.spatial", reason="needs the shapes extra")
    dense = solid(prompt).sample(20_000, random(1))
    queries = random(2).uniform(-1.2, 1.2, (200, 3))
    brute = spatial.cKDTree(dense).query(queries)[0]
    exact = solid(prompt).distance(queries)
    # No sample is nearer than the surface, and of 20 000 samples the nearest is not much farther.
    assert (brute >= exact - 1e-9).all()
    assert (brute - exact).max() < 0.05


def test_distances_known_by_heart():
    np.testing.assert_allclose(
        solid("sphere").distance(np.array([[0.0, 0, 0], [0, 0, 2], [0.5, 0, 0]])), [1, 1, 0.5], atol=6e-4
    )
    half = 3**-0.5
    np.testing.assert_allclose(
        solid("cube").distance(np.array([[0.0, 0, 0], [2, 0, 0], [2, 2, half]])), [half, 2 - half, 2**0.5 * (2 - half)]
    )
    np.testing.assert_allclose(solid("torus").distance(np.zeros((1, 3))), [0.6 / 1.4], atol=1e-3)
    assert solid("two spheres").distance(np.zeros(3)) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("prompt", SOME)
def test_samples_spread_by_area(prompt):
    """A sampler that favours a facet or a cap would have wrong moments, so they are compared with those of another method:
    uniform points of the cube whose exact distance from the surface is below 0.03."""
    shell = random(3).uniform(-1, 1, (100_000, 3))
    shell = shell[solid(prompt).distance(shell) < 0.03]
    drawn = solid(prompt).sample(len(shell), random(4))
    np.testing.assert_allclose(np.abs(drawn).mean(0), np.abs(shell).mean(0), atol=0.03)
    np.testing.assert_allclose(drawn.std(0), shell.std(0), atol=0.03)


def test_the_vocabulary():
    assert len(PROMPTS) == len(set(PROMPTS)) == 48
    assert set(HELD_OUT) <= set(PROMPTS) and set(TRAINED_PROMPTS) == set(PROMPTS) - set(HELD_OUT)
    words = {word for prompt in TRAINED_PROMPTS for word in prompt.split()}
    assert {word for prompt in HELD_OUT for word in prompt.split()} <= words


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_distance_is_lipschitz_and_shaped_like_its_input(x, y, z):
    points = np.array([[[x, y, z], [x + 0.1, y, z]]])
    found = solid("two flat helices").distance(points)
    assert found.shape == (1, 2)
    assert abs(found[0, 0] - found[0, 1]) <= 0.1 + 1e-6


def test_unknown_prompts_are_refused():
    with pytest.raises(ValueError, match="one of PROMPTS"):
        solid("flat teapot")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_signed_distance_tells_inside_from_outside(prompt):
    surface, random = solid(prompt), np.random.default_rng(2)
    points = random.uniform(-1.05, 1.05, (3000, 3))
    signed = signed_distance(surface, points)
    np.testing.assert_allclose(np.abs(signed), surface.distance(points), atol=1e-12)
    assert (signed[np.linalg.norm(points, axis=-1) > 1] < 0).all()
    # A straight way between two points of different sign crosses the surface, so it is longer than both distances together.
    first, second = points[::2], points[1::2]
    crossing = signed[::2] * signed[1::2] < 0
    way = np.linalg.norm(first - second, axis=-1)
    assert crossing.any()
    assert (way[crossing] >= np.abs(signed[::2] - signed[1::2])[crossing] - 1e-9).all()


@pytest.mark.parametrize("prompt", SOME)
def test_the_volume_is_the_share_of_points_that_are_inside(prompt):
    surface = solid(prompt)
    steps = np.array([0.8191725134, 0.6710436067, 0.5497004779])  # a sequence that fills the cube evenly
    points = 2 * (np.arange(1, 80_000)[:, None] * steps % 1) - 1
    assert 8 * surface.inside(points).mean() == pytest.approx(surface.volume(), rel=0.03)


def test_topologies_and_gaps():
    found = {prompt: solid(prompt).topology() for prompt in ("cube", "tall torus", "helix", "two tori", "two flat helices")}
    assert [(each.components, each.euler_number) for each in found.values()] == [(1, 2), (1, 0), (1, 2), (2, 0), (2, 4)]
    assert solid("two spheres").gap() == pytest.approx(0, abs=1e-9)
    assert solid("two cubes").gap() == pytest.approx(1 - 3**-0.5)
    assert solid("two cubes").reach() == pytest.approx(0.5 + 0.5 * 3**-0.5)
