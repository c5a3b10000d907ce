"""Real photographs: those that ship with scikit-image, and cut-outs of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

DATA = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="session")
def photograph() -> Callable[[str], bytes]:
    """photograph(name): the bytes of one of scikit-image's files."""
    return lambda name: (DATA / name).read_bytes()


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(picture, format="PNG", **options): the bytes of a file."""

    def encode(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
        file = io.BytesIO()
        picture.save(file, format, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def cut_out(photograph: Callable[[str], bytes]) -> Image.Image:
    """The coffee cup behind a soft elliptic mask, off the centre: RGBA."""
    picture = Image.open(io.BytesIO(photograph("coffee.png"))).convert("RGBA")
    y, x = np.mgrid[: picture.height, : picture.width]
    distance = np.hypot((x - 300) / 170, (y - 180) / 90)
    picture.putalpha(Image.fromarray((np.clip(1.2 - distance, 0, 0.2) * 5 * 255).astype(np.uint8)))
    return picture
