"""Pictures show the solid, in the light and from the side that was asked for, and are the same every time."""

import numpy as np
import pytest
import torch
from views import NOTHING, SIDE, TOKENS, VOCABULARY, Dresser, fitted, targets

from hunyuan3d_export.shapes import TRAINED_PROMPTS, solid
from hunyuan3d_export.shapes.decoding import mesh_of
from hunyuan3d_export.shapes.mesh_pictures import save_meshes, shaded
from hunyuan3d_export.shapes.render import (
    Look,
    View,
    distance_of,
    gridded,
    picture,
    random_look,
    random_view,
    shade,
    trace,
)
from hunyuan3d_export.shapes.solids import signed_distance


def test_a_sphere_is_a_disc_whose_normals_are_its_points():
    shown, normals = trace(distance_of("sphere"), View(distance=100.0, zoom=0.5), 40)
    line = (np.arange(40) + 0.5) / 40 * 2 - 1
    right, up = np.meshgrid(line, -line)
    inside = np.hypot(right, up) < 0.47
    assert shown[inside].all() and not shown[np.hypot(right, up) > 0.54].any()
    np.testing.assert_allclose(normals[inside][:, :2], 2 * np.stack([right, up], -1)[inside], atol=0.07)
    assert (normals[~shown] == 0).all()


def test_the_hole_of_a_torus_is_seen_from_above_alone():
    above, _ = trace(distance_of("flat torus"), View(elevation=89), 21)
    beside, _ = trace(distance_of("flat torus"), View(elevation=1), 21)
    assert not above[10, 10] and above[10, 3] and beside[10, 10]


def test_a_picture_has_alpha_or_a_background():
    clear = picture(distance_of("cube"), View(), Look(), 16)
    assert clear.shape == (16, 16, 4) and clear[0, 0, 3] == 0 and clear[8, 8, 3] == 255
    opaque = picture(distance_of("cube"), View(), Look(background=(0, 1, 0)), 16)
    assert opaque.shape == (16, 16, 3) and tuple(opaque[0, 0]) == (0, 255, 0)
    np.testing.assert_array_equal(clear[8, 8, :3], opaque[8, 8])


def test_light_brightens_what_faces_it():
    normals = np.array([[0.0, 0, 1], [1, 0, 0], [-1, 0, 0]])
    front, lit, dark = shade(normals, Look(light=(1, 0, 0), colour=(1, 1, 1), ambient=0.3))[:, 0]
    assert lit > front > dark == pytest.approx(0.3)


def test_the_same_seed_gives_the_same_picture():
    def draw():
        random = np.random.default_rng(5)
        return picture(gridded("cone", 24), random_view(random), random_look(random, alpha=False), 24)

    np.testing.assert_array_equal(draw(), draw())


@pytest.mark.parametrize("prompt", ["flat cylinder", "two cones"])
def test_a_grid_of_distances_is_near_the_exact_distance(prompt):
    points = np.random.default_rng(0).uniform(-1.3, 1.3, (2000, 3))
    found, exact = gridded(prompt, 48)(points), signed_distance(solid(prompt), points)
    assert np.abs(found - exact)[np.abs(exact) < 0.05].max() < 0.02
    assert (found >= exact - 0.02).all(), "a ray must not step over the surface"


def test_every_prompt_has_its_own_words():
    words = {prompt: tuple(targets(prompt)) for prompt in TRAINED_PROMPTS}
    assert len(set(words.values())) == len(words) and all(len(each) == TOKENS for each in words.values())
    assert [VOCABULARY[word] for word in targets("flat torus")] == [NOTHING, "flat", "torus"]
    assert [VOCABULARY[word] for word in targets("two cubes")] == ["two", NOTHING, "cubes"]


def test_views_are_dressed_anew_each_time():
    packed = torch.from_numpy(np.stack([fitted(*trace(distance_of("cube"), View(), 48))] * 16))
    dresser = Dresser(0)
    first, second = dresser.pixels(packed), dresser.pixels(packed)
    assert first.shape == (16, 1, 3, SIDE, SIDE) and torch.isfinite(first).all()
    assert (first - second).abs().mean() > 0.1
    corners = first[:, 0, :, 0, 0]
    assert 3 <= (corners > 2.0).all(1).sum() <= 13, "about half of the pictures are on white"


@pytest.fixture(scope="module")
def cone():
    return mesh_of(lambda points: np.clip(16 * distance_of("cone")(points), -1, 1).astype(np.float32), 32)


def test_a_mesh_is_drawn_where_it_is(cone):
    drawn = shaded(cone, 40)
    assert drawn.shape == (40, 40, 3) and (drawn[0, 0] == 255).all()
    shown = (drawn < 250).any(-1)
    traced, _ = trace(distance_of("cone"), View(azimuth=-55.0, elevation=28.0, distance=200.0, zoom=0.98), 40)
    assert (shown == traced).mean() > 0.96
    np.testing.assert_array_equal(drawn, shaded(cone, 40))


def test_a_grid_of_meshes_is_the_same_file_every_time(cone, tmp_path):
    for name in ("a.png", "b.png"):
        save_meshes({"cone": cone, "again": cone}, tmp_path / name, pixels=40, titles={"again": "cone *"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="meshes must hold at least one mesh"):
        save_meshes({}, tmp_path / "c.png")
