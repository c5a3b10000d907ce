"""Preprocessing against torchvision's transforms, and the pictures that it refuses."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import image_preprocessing as subject
import numpy as np
import pytest
from PIL import Image

Photograph = Callable[[str], bytes]
Encode = Callable[..., bytes]


PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png", "retina.jpg")
RECIPE = Path(__file__).parent / "torchvision_recipe.py"


@pytest.fixture(scope="module")
def recipe(photograph: Photograph, cut_out: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """torchvision's results for the photographs and for the cut-out, which `on_white` puts on white first."""
    folder = tmp_path_factory.mktemp("recipe")
    pictures = {name: np.asarray(Image.open(io.BytesIO(photograph(name))).convert("RGB")) for name in PHOTOGRAPHS}
    np.savez(folder / "pictures.npz", **pictures, cut_out=on_white(np.asarray(cut_out)))
    torchvision = Path(sys.prefix) / "torchvision"
    assert torchvision.is_dir(), "make setup puts it there"
    command = [sys.executable, RECIPE, torchvision, folder / "pictures.npz", folder / "recipe.npz"]
    subprocess.run(command, check=True, timeout=240)
    with np.load(folder / "recipe.npz") as found:
        return dict(found)


def on_white(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] -> uint8 [S, S, 3]: the visible box over white, centred, 15 % of the side left free."""
    rows, columns = np.nonzero(picture[..., 3].any(axis=1))[0], np.nonzero(picture[..., 3].any(axis=0))[0]
    shown = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
    alpha = shown[..., 3:] / 255
    side = int(np.ceil(max(shown.shape[:2]) / 0.85))
    canvas = np.full((side, side, 3), 255.0)
    top, left = (side - shown.shape[0]) // 2, (side - shown.shape[1]) // 2
    canvas[top : top + shown.shape[0], left : left + shown.shape[1]] = shown[..., :3] * alpha + 255 * (1 - alpha)
    return canvas.round().astype(np.uint8)


def difference(found: np.ndarray, expected: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("size", [518, 1022])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(name: str, size: int, photograph: Photograph, recipe: dict[str, np.ndarray]) -> None:
    picture = subject.decode(photograph(name))
    assert picture.mode == "RGB"
    assert difference(subject.square(picture, size), recipe[f"{name} {size}"]) <= 1
    found = subject.pixels([photograph(name)], size)[0, 0]
    levels = np.abs(found - recipe[f"{name} {size} normalised"]) * 255 * subject.STD[:, None, None]
    assert levels.max() <= 1.001


@pytest.mark.parametrize("size", [518, 1022])
def test_photographs_with_alpha(size: int, cut_out: Image.Image, encoded: Encode, recipe: dict[str, np.ndarray]) -> None:
    for data in (encoded(cut_out), encoded(cut_out, "WEBP", lossless=True)):
        picture = subject.decode(data)
        assert picture.mode == "RGBA"
        assert difference(subject.square(picture, size), recipe[f"cut_out {size}"]) <= 1


def test_a_cut_out_is_centred_and_spans_85_percent(encoded: Encode) -> None:
    picture = Image.new("RGBA", (400, 300))
    picture.paste((0, 0, 0, 255), (10, 20, 110, 70))
    dark = subject.square(subject.decode(encoded(picture)), 518).mean(axis=2) < 128
    rows, columns = np.nonzero(dark.any(axis=1))[0], np.nonzero(dark.any(axis=0))[0]
    assert len(columns) == pytest.approx(0.85 * 518, abs=5) and len(rows) == pytest.approx(0.425 * 518, abs=5)
    assert columns[0] + columns[-1] == pytest.approx(517, abs=5) and rows[0] + rows[-1] == pytest.approx(517, abs=5)
    assert subject.square(subject.decode(encoded(picture)), 518)[0, 0].tolist() == [255, 255, 255]


def test_an_opaque_alpha_channel_counts_as_none(encoded: Encode, photograph: Photograph) -> None:
    plain = subject.decode(photograph("coffee.png"))
    np.testing.assert_array_equal(subject.decode(encoded(plain.convert("RGBA"))), plain)


def test_normalised_views(photograph: Photograph) -> None:
    files = [photograph("coffee.png"), photograph("rocket.jpg")]
    found = subject.pixels(files, 518)
    assert (found.shape, found.dtype) == ((1, 2, 3, 518, 518), np.float32)
    for view, data in zip(found[0], files, strict=True):
        restored = (view.transpose(1, 2, 0) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
        np.testing.assert_allclose(restored, subject.square(subject.decode(data), 518), atol=1e-3)


def test_exif_orientation(encoded: Encode, photograph: Photograph) -> None:
    picture = subject.decode(photograph("rocket.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: the viewer must turn the picture by 90 degrees
    turned = subject.decode(encoded(picture, "PNG", exif=exif))
    np.testing.assert_array_equal(turned, picture.transpose(Image.Transpose.ROTATE_270))


def test_16_bit_grey_is_scaled_not_clipped(encoded: Encode) -> None:
    ramp = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    found = np.asarray(subject.decode(encoded(Image.fromarray(ramp))))
    np.testing.assert_array_equal(found[..., 0], np.round(ramp / 257.0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_other_modes(mode: str, cut_out: Image.Image, encoded: Encode) -> None:
    data = encoded(cut_out.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    found = subject.square(subject.decode(data), 518)
    assert found.shape == (518, 518, 3) and 20 < found.mean() < 250


def png_of(width: int, height: int) -> bytes:
    """A tiny file that claims to be large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_refused(encoded: Encode, cut_out: Image.Image, photograph: Photograph) -> None:
    animated = {"save_all": True, "append_images": [cut_out.rotate(90)]}
    cases = {
        "of 1 to 33554432 bytes, got 0": b"",
        "of 1 to 33554432 bytes, got 33554433": b"x" * (subject.MOST_BYTES + 1),
        "a PNG, JPEG or WebP file, got b'not a pi'": b"not a picture",
        "a PNG, JPEG or WebP file, got b'GIF8": encoded(cut_out.convert("P"), "GIF"),
        "a whole PNG, JPEG or WebP file, got: ": photograph("coffee.png")[:20_000],
        "a whole PNG, JPEG or WebP file, got": photograph("rocket.jpg")[:2_000],
        "at most 4096 pixels wide and high, got 4097 x 1": png_of(4097, 1),
        "at most 4096 pixels wide and high, got: ": png_of(60_000, 60_000),
        "a still picture, got 2 frames": encoded(cut_out, "PNG", **animated),
        "a still picture, got 2": encoded(cut_out, "WEBP", **animated),
    }
    for message, data in cases.items():
        with pytest.raises(subject.InvalidImage, match="^image must be ") as caught:
            subject.pixels([data], 518)
        assert message in str(caught.value) and "object at 0x" not in str(caught.value)
    with pytest.raises(subject.InvalidImage, match="^image must show something, got an alpha channel of zeros"):
        subject.pixels([encoded(Image.new("RGBA", (9, 9)))], 518)
    with pytest.raises(subject.InvalidImage, match="^view 2: image must be"):
        subject.pixels([photograph("coffee.png"), b"?"], 518)


def test_thin_pictures(encoded: Encode) -> None:
    for shape in ((1, 4096), (4096, 1), (160, 9)):
        assert subject.pixels([encoded(Image.new("RGBA", shape, (200, 10, 10, 128)))], 518).shape == (1, 1, 3, 518, 518)
        with pytest.raises(subject.InvalidImage, match=f"at most 16 times as long as wide, got {shape[0]} x {shape[1]}"):
            subject.pixels([encoded(Image.new("RGB", shape))], 518)
    assert subject.pixels([encoded(Image.new("RGB", (160, 10)))], 518).shape == (1, 1, 3, 518, 518)


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, removed or doubled."""
    spoilt = bytearray(data)
    for _ in range(generator.randint(1, 12)):
        at = generator.randrange(len(spoilt))
        kind = generator.randrange(4)
        if kind < 2:
            spoilt[at] = generator.randrange(256)
        elif kind == 2:
            del spoilt[at : at + generator.randint(1, 200)]
        else:
            spoilt[at:at] = spoilt[at : at + 40]
        if not spoilt:
            break
    return bytes(spoilt)


def test_1000_mutated_files_give_a_picture_or_an_invalid_image(encoded: Encode, cut_out: Image.Image) -> None:
    small = cut_out.resize((60, 40))
    files = [
        encoded(small),
        encoded(small.convert("P")),
        encoded(small.convert("RGB"), "JPEG"),
        encoded(small.convert("CMYK"), "JPEG"),
        encoded(small.convert("RGB"), "JPEG", progressive=True),
        encoded(small, "WEBP"),
        encoded(small.convert("RGB"), "WEBP", lossless=True),
    ]
    generator, refused, count = random.Random(1000), 0, 1000
    for index in range(count):
        data = mutated(files[index % len(files)], generator)
        try:
            found = subject.pixels([data], 28)
        except subject.InvalidImage:
            refused += 1
        else:
            assert found.shape == (1, 1, 3, 28, 28) and np.isfinite(found).all()
    assert 0.2 * count < refused < count
