"""Points survive the way into 64 channels and back, and the part of latents that is no point is measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from hunyuan3d_client.shapes import LATENT_CHANNELS, POINT_SCALE, decode_points, encode_points, frame, out_of_subspace_energy

POINTS = arrays(
    np.float32, array_shapes(min_dims=1, max_dims=3).map(lambda s: (*s, 3)), elements={"min_value": -2, "max_value": 2}
)


@given(POINTS)
def test_round_trip(points):
    latents = encode_points(points)
    assert latents.shape == (*points.shape[:-1], LATENT_CHANNELS) and latents.dtype == points.dtype
    np.testing.assert_allclose(decode_points(latents), points, atol=1e-6)
    assert out_of_subspace_energy(latents) < 1e-10


def test_the_frame_is_orthonormal_and_exact_in_half_precision():
    assert (frame() @ frame().T == np.eye(3)).all()
    assert (frame().astype(np.float16) == frame()).all()


def test_distances_are_scaled_evenly():
    points = np.random.default_rng(0).standard_normal((2, 3))
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(encode_points(points), axis=0)), POINT_SCALE * np.linalg.norm(np.diff(points, axis=0))
    )


def test_energy_is_one_for_noise():
    noise = np.random.default_rng(0).standard_normal((4, 256, LATENT_CHANNELS))
    assert out_of_subspace_energy(noise) == pytest.approx(1.0, rel=0.02)
