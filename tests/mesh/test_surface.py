"""The followed surface is scikit-image's dense one, at a fraction of the evaluations."""

from __future__ import annotations

from typing import Any

import dense
import fields
import numpy as np
import pytest
import trimesh
from dense import drive
from failures import EmptyField, FieldError, FullField, NotFinite, TooManyEvaluations
from fields import BOUNDS
from hypothesis import given, settings
from hypothesis import strategies as st
from surface import Surface, extract
from topology import measure

SHAPES = ("sphere", "box", "torus", "chair", "gyroid", "waves")


def field_named(name: str, resolution: int) -> fields.Field:
    if name == "chair":
        return fields.chair(resolution)
    return fields.waves(3) if name == "waves" else getattr(fields, name)  # type: ignore[no-any-return]


def largest_parts(vertices: np.ndarray, faces: np.ndarray, like: Surface) -> tuple[np.ndarray, np.ndarray]:
    """The parts of a mesh that have a vertex of the surface `like`: the other ones are islands that no coarse edge crosses."""
    parts = measure(faces, len(vertices)).parts
    found = {vertex.tobytes() for vertex in like.vertices}
    kept = np.unique(parts[[vertex.tobytes() in found for vertex in vertices]])
    faces = faces[np.isin(parts[faces[:, 0]], kept)]
    return vertices[np.unique(faces)], np.searchsorted(np.unique(faces), faces)


def assert_equals_dense(field: fields.Field, resolution: int, **options: Any) -> Surface:
    """The triangles and vertices of every component that a coarse edge crosses, and the number of evaluations."""
    values = dense.volume(field, resolution)
    surface = drive(field, resolution, **options)
    vertices, faces = largest_parts(*dense.marching(values), surface)
    dense.assert_equal(vertices, faces, surface)
    statistics = surface.statistics
    assert statistics.watertight
    assert sum(statistics.evaluations_by_level) == statistics.evaluations
    coarse = statistics.evaluations_by_level[0]
    assert statistics.evaluations <= 1.2 * dense.needed_points(values) + coarse
    assert trimesh.Trimesh(surface.vertices, surface.faces, process=False).volume > 0
    return surface


@pytest.mark.parametrize("shape", SHAPES)
def test_the_surface_is_that_of_dense_marching_cubes(shape: str) -> None:
    assert_equals_dense(field_named(shape, 63), 63)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("resolution", [128, 256, 384])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_surface_is_that_of_dense_marching_cubes_when_finer(shape: str, resolution: int) -> None:
    surface = assert_equals_dense(field_named(shape, resolution), resolution)
    if (shape, resolution) == ("chair", 384):
        assert surface.statistics.evaluations <= 385**3 / 60


def test_rods_between_coarse_points_are_followed() -> None:
    surface = drive(fields.chair(96), 96, coarse=12)
    whole = drive(fields.chair(96), 96, method="dense")
    assert surface.statistics.components == whole.statistics.components == 1
    dense.assert_equal(whole.vertices, whole.faces, surface)


def test_an_island_between_coarse_points_is_missed_and_dense_finds_it() -> None:
    def field(points: np.ndarray) -> np.ndarray:
        speck = np.where(np.linalg.norm(points - np.array([0.8, 0.8, 0.8]), axis=1) < 0.05, 1, -1)
        return np.maximum(fields.sphere(points), speck).astype(np.float32)

    assert drive(field, 64, coarse=8).statistics.components == 1
    assert drive(field, 64, coarse=8, method="dense").statistics.components == 2
    assert drive(field, 64, coarse=64).statistics.components == 2  # the option is read


def test_unsaturated_values_lead_to_parts_that_no_coarse_edge_crosses() -> None:
    def field(points: np.ndarray) -> np.ndarray:
        rod = 0.02 - np.linalg.norm(points[:, :2] - np.array([0.33, 0.29]), axis=1)
        return np.clip(np.minimum(rod, 0.7 - np.abs(points[:, 2])) / 0.15, -1, 1).astype(np.float32)

    values = dense.volume(field, 64)[::8, ::8, ::8]
    assert (values < 0).all(), "no coarse point is inside"
    assert drive(field, 64, coarse=8).statistics.components == 1


@pytest.mark.parametrize("resolution", [63, 64, 100])
def test_sizes_and_places_are_right(resolution: int) -> None:
    cell = 2 * BOUNDS / resolution
    vertices = drive(fields.sphere, resolution).vertices.astype(np.float64)
    centre = np.array([0.05, -0.02, 0.01])
    exact = (np.abs(np.linalg.norm(vertices - centre, axis=1) - 0.7)).max()
    assert exact < cell**2 / (8 * 0.7) + 1e-6, "the vertices are off by no more than the interpolation's own error"
    box = drive(fields.box, resolution).vertices
    np.testing.assert_allclose(box.max(axis=0), [0.53, 0.4, 0.2], atol=0.01 * cell)
    np.testing.assert_allclose(box.min(axis=0), [-0.47, -0.4, -0.4], atol=0.01 * cell)


def test_no_point_is_asked_for_twice() -> None:
    asked: list[np.ndarray] = []

    def field(points: np.ndarray) -> np.ndarray:
        assert points.dtype == np.float32 and points.shape[1] == 3
        asked.append(points.copy())
        return fields.gyroid(points)

    surface = drive(field, 100)
    points = np.concatenate(asked)
    assert len(np.unique(points, axis=0)) == len(points) == surface.statistics.evaluations
    assert len(asked) == surface.statistics.waves
    assert np.abs(points).max() <= np.float32(BOUNDS)


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_the_last_bit_leaves_the_surface_closed(seed: int) -> None:
    generator = np.random.default_rng(seed)

    def field(points: np.ndarray) -> np.ndarray:
        values = fields.chair(96)(points) * (1 + generator.uniform(-1e-3, 1e-3, len(points)))
        return (values + generator.uniform(-5e-4, 5e-4, len(points))).astype(np.float16).astype(np.float32)

    assert drive(field, 96).statistics.watertight


def test_a_surface_through_the_box_is_closed_there() -> None:
    surface = drive(fields.waves(3), 40)
    assert surface.statistics.closed_at_box and surface.statistics.watertight
    assert np.abs(surface.vertices).max() == np.float32(BOUNDS)
    unclosed = drive(fields.waves(3), 40, closed=False)
    assert not unclosed.statistics.closed_at_box and not unclosed.statistics.watertight
    assert len(unclosed.faces) < len(surface.faces)
    assert not drive(fields.sphere, 40).statistics.closed_at_box


def test_the_level_moves_the_surface() -> None:
    def distance(points: np.ndarray) -> np.ndarray:
        return (0.5 - np.linalg.norm(points, axis=1)).astype(np.float32)

    radii = [np.linalg.norm(drive(distance, 64, level=level, bounds=0.9).vertices, axis=1).mean() for level in (0.0, 0.1, -0.2)]
    np.testing.assert_allclose(radii, [0.5, 0.4, 0.7], atol=1e-3)


def test_progress_is_told_before_each_wave() -> None:
    told: list[tuple[int, int, int]] = []
    surface = drive(fields.sphere, 200, progress=lambda *figures: told.append(figures))
    assert len(told) == surface.statistics.waves
    assert told[0] == (0, 3, 0) and {levels for _, levels, _ in told} == {3}
    assert told == sorted(told) and told[-1][0] == 2
    assert told[-1][2] < surface.statistics.evaluations


def test_small_waves_are_enlarged() -> None:
    """A rod that is seen at its end only would take a wave a cell."""

    def field(points: np.ndarray) -> np.ndarray:
        rod = np.maximum(np.linalg.norm(points[:, :2] - np.array([0.011, 0.013]), axis=1) - 0.012, np.abs(points[:, 2]) - 0.9)
        ball = np.linalg.norm(points - np.array([0, 0, -0.9]), axis=1) - 0.1
        return np.where(np.minimum(rod, ball) < 0, 1, -1).astype(np.float32)

    surface = drive(field, 256, coarse=16)
    assert surface.statistics.components == 1 and surface.vertices[:, 2].max() > 0.89
    assert surface.statistics.waves < 60, "the rod is more than 200 cells long"


def test_a_field_without_a_surface_is_an_error() -> None:
    with pytest.raises(EmptyField, match="hint:"):
        drive(lambda points: np.full(len(points), -1, np.float32), 32)
    with pytest.raises(FullField, match="hint:"):
        drive(lambda points: np.full(len(points), 1, np.float32), 32)
    with pytest.raises(EmptyField):
        drive(lambda points: np.zeros(len(points), np.float32), 32)
    with pytest.raises(EmptyField):
        drive(lambda points: np.full(len(points), -0.5, np.float32), 32, method="dense")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wave", [0, 2])
def test_values_that_are_not_finite_are_an_error(wrong: float, wave: int) -> None:
    waves = iter(range(100))

    def field(points: np.ndarray) -> np.ndarray:
        values = fields.sphere(points)
        if next(waves) == wave:
            values[len(values) // 2] = wrong
        return values

    with pytest.raises(NotFinite, match=r"1 values that are NaN or infinite, the first of them at \(.*\nhint: "):
        drive(field, 64)


def test_evaluations_are_bounded() -> None:
    needed = drive(fields.sphere, 64).statistics.evaluations
    drive(fields.sphere, 64, max_evaluations=needed)
    with pytest.raises(TooManyEvaluations, match=f"allowed {needed - 1} evaluations.*\nhint: "):
        drive(fields.sphere, 64, max_evaluations=needed - 1)
    assert issubclass(TooManyEvaluations, FieldError) and issubclass(FieldError, ValueError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resolution": 7}, "resolution must be in 8..1024, got 7"),
        ({"resolution": 1025}, "resolution must be in 8..1024, got 1025"),
        ({"bounds": 0.0}, "bounds must be finite and above 0, got 0.0"),
        ({"bounds": np.nan}, "bounds must be finite and above 0, got nan"),
        ({"level": np.inf}, "level must be finite, got inf"),
        ({"method": "guess"}, "method must be one of follow, dense, got 'guess'"),
        ({"coarse": 3}, "coarse must be in 4..32, which is resolution, got 3"),
        ({"coarse": 33}, "coarse must be in 4..32, which is resolution, got 33"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_errors_with_a_hint(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        next(extract(**{"resolution": 32, **options}))
    first, hint = str(error.value).split("\n")
    assert first == text and hint.startswith("hint: ")


def test_answers_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"values must be of shape \[\d+\], got \[1\]"):
        drive(lambda points: np.ones_like(points[:1, 0]), 32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    resolution=st.integers(8, 24),
    coarse=st.integers(4, 8),
    kind=st.sampled_from(["normal", "zeros", "signs", "small", "halves"]),
)
def test_random_fields_have_closed_surfaces(seed: int, resolution: int, coarse: int, kind: str) -> None:
    """Values equal to the level, equal products on a side and values next to the level included."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(resolution + 1,) * 3).astype(np.float32)
    values = {
        "normal": values,
        "zeros": np.where(generator.uniform(size=values.shape) < 0.3, np.float32(0), values),
        "signs": np.where(values > 0, np.float32(1), np.float32(-1)),
        "small": np.where(generator.uniform(size=values.shape) < 0.3, values * np.float32(3e-7), values),
        "halves": np.round(values * 2) / 2,
    }[kind]
    field = dense.field_of(values)
    whole, followed = (drive(field, resolution, method=method, coarse=coarse) for method in ("dense", "follow"))
    for surface in (whole, followed):
        assert surface.statistics.watertight and np.isfinite(surface.vertices).all()
    assert whole.statistics.evaluations == (resolution + 1) ** 3
    assert followed.statistics.evaluations <= whole.statistics.evaluations
    if kind == "normal":
        dense.assert_equal(*dense.marching(values), whole)


def test_a_level_costs_no_more_than_the_surface_itself() -> None:
    """Away from the surface, values are about 1 or -1 at every level, and no such point is looked at more closely."""

    def field(points: np.ndarray) -> np.ndarray:
        return np.clip(16 * (0.7 - np.linalg.norm(points, axis=1)), -1, 1).astype(np.float32)

    plain, raised = (drive(field, 128, level=level).statistics.evaluations for level in (0.0, 0.6))
    assert raised < 1.3 * plain
