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


def test_a_single_picture_is_filled_and_its_title_is_whole(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the shapes extra")
    from PIL import Image

    sphere = np.random.default_rng(0).standard_normal((2000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    for title in ("two flat tetrahedra", "a title of " + "many " * 30 + "words"):
        save_grid({title: sphere}, tmp_path / "one.png")
        with Image.open(tmp_path / "one.png") as picture:
            ink = np.asarray(picture.convert("L")) < 200
        rows, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
        assert rows[0] > 2 and columns[0] > 2 and columns[-1] < ink.shape[1] - 3, "nothing touches the edge"
        gap = np.nonzero(~ink.any(axis=1))[0]
        assert (gap > rows[0]).any(), "a title, then a gap, then the points"
        assert abs(columns[0] + columns[-1] - ink.shape[1]) < 0.1 * ink.shape[1], "no half is blank"


def test_the_ending_says_the_format(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the shapes extra")
    for ending, start in ((".jpg", b"\xff\xd8\xff"), (".JPEG", b"\xff\xd8\xff"), (".png", b"\x89PNG")):
        save_grid(CLOUDS, tmp_path / f"grid{ending}")
        assert (tmp_path / f"grid{ending}").read_bytes().startswith(start)
    with pytest.raises(ValueError, match="the picture must be a .png or .jpg or .jpeg file, got .*grid.gif"):
        save_grid(CLOUDS, tmp_path / "grid.gif")


def test_no_clouds_no_picture(tmp_path):
    with pytest.raises(ValueError, match="at least one cloud"):
        save_grid({}, tmp_path / "grid.png")


def test_ply_round_trip(tmp_path):
    save_ply(CLOUDS["torus"], tmp_path / "torus.ply")
    header, body = (tmp_path / "torus.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 64\n" in header and header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    np.testing.assert_array_equal(np.frombuffer(body, "<f4").reshape(64, 3), CLOUDS["torus"].astype(np.float32))
