"""Pictures and PLY files hold the clouds that they were made of."""

import struct

import numpy as np
import pytest

from hunyuan3d_client.shapes.pictures import save_grid, save_ply

CLOUDS = {
    name: np.random.default_rng(seed).uniform(-1, 1, (64, 3)) for seed, name in enumerate(("cube", "torus", "two flat cones"))
}


def test_a_grid_is_a_png_that_shows_its_clouds(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the shapes extra")
    save_grid(CLOUDS, tmp_path / "grid.png")
    first = (tmp_path / "grid.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", first[16:24])
    assert 200 < height < width < 1000
    save_grid({**CLOUDS, "torus": CLOUDS["cube"]}, tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "other.png"]


def test_no_clouds_no_picture(tmp_path):
    with pytest.raises(ValueError, match="at least one cloud"):
        save_grid({}, tmp_path / "grid.png")


def test_ply_round_trip(tmp_path):
    save_ply(CLOUDS["torus"], tmp_path / "torus.ply")
    header, body = (tmp_path / "torus.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 64\n" in header and header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    np.testing.assert_array_equal(np.frombuffer(body, "<f4").reshape(64, 3), CLOUDS["torus"].astype(np.float32))
