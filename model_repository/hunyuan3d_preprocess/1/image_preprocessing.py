"""Image files -> what the image encoder takes. PIL and numpy only; knows nothing of Triton.

Axes: V views, P the side of the square picture in pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES = 32 * 2**20
# Bounds what a small file can unpack to: 268 MB decoded, as much again for the white canvas.
MOST_SIDE = 8192
MOST_RATIO = 16  # the whole is resized before its centre is taken
BORDER = 0.15  # of the canvas' side, both edges together, around what a picture with alpha shows
WHITE = (255, 255, 255)
# ImageNet's, which DINOv2 was trained with.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


class InvalidImage(ValueError):
    """The bytes are no picture this model takes; the message says why."""


def pixels(images: Sequence[bytes], size: int) -> np.ndarray:
    """The views' files, in the order front, left, back, right -> [1, V, 3, P, P] float32, P = size, normalised.

    Raises InvalidImage, naming the view where there are several.
    """
    views = []
    for index, data in enumerate(images):
        try:
            views.append(normalise(square(decode(data), size)))
        except InvalidImage as error:
            raise InvalidImage(f"view {index + 1}: {error}" if len(images) > 1 else str(error)) from error
    return np.stack(views)[None]


def decode(data: bytes) -> Image.Image:
    """A PNG, JPEG or WebP file -> 8-bit RGB, or RGBA where some of it is transparent, turned as its EXIF says.

    Raises InvalidImage for anything else: no such file, a damaged or animated one, one that is too large.
    """
    if not 0 < len(data) <= MOST_BYTES:
        raise InvalidImage(f"image must be of 1 to {MOST_BYTES} bytes, got {len(data)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of sizes and odd metadata: sizes are checked here, metadata not used
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_header(image)
                image.load()
                return _eight_bit(ImageOps.exif_transpose(image))
        except InvalidImage:
            raise
        except Image.DecompressionBombError as error:
            raise InvalidImage(f"image must be at most {MOST_SIDE} pixels wide and high, got: {error}") from error
        except Image.UnidentifiedImageError as error:
            raise InvalidImage(f"image must be a PNG, JPEG or WebP file, got {data[:8]!r}...") from error
        except Exception as error:  # a damaged file raises whatever its decoder happens to meet
            raise InvalidImage(f"image must be a whole PNG, JPEG or WebP file, got: {error!r}") from error


def _check_header(image: Image.Image) -> None:
    if max(image.size) > MOST_SIDE:
        raise InvalidImage(f"image must be at most {MOST_SIDE} pixels wide and high, got {image.width} x {image.height}")
    # A JPEG may carry further pictures (depth, gain maps): the first is the photograph.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise InvalidImage(f"image must be a still picture, got {getattr(image, 'n_frames', 'several')} frames")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
        grey = np.clip(np.asarray(image, np.float64) / 257, 0, 255).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image if image.getextrema()[3] != (255, 255) else image.convert("RGB")


def square(image: Image.Image, size: int) -> np.ndarray:
    """RGB as it is, RGBA cropped to what it shows and centred on a white canvas; then the shorter side resized
    (bicubic, antialiased) to `size` and the centre taken -> uint8 [P, P, 3].

    Raises InvalidImage when nothing of an RGBA picture is visible, or an RGB one is a thin strip.
    """
    if image.mode == "RGBA":
        image = _on_canvas(image)
    shorter = min(image.size)
    if max(image.size) > MOST_RATIO * shorter:
        raise InvalidImage(f"image must be at most {MOST_RATIO} times as long as wide, got {image.width} x {image.height}")
    resized = [int(size * side / shorter) for side in image.size]
    left, top = (round((side - size) / 2) for side in resized)
    image = image.resize((resized[0], resized[1]), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _on_canvas(image: Image.Image) -> Image.Image:
    """What RGBA shows, centred on a white square of which it spans 85 %."""
    visible = image.getchannel("A").getbbox()
    if visible is None:
        raise InvalidImage("image must show something, got an alpha channel of zeros")
    image = image.crop(visible)
    side = math.ceil(max(image.size) / (1 - BORDER))
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2), mask=image)
    return canvas


def normalise(picture: np.ndarray) -> np.ndarray:
    """uint8 [P, P, 3] -> float32 [3, P, P], ImageNet's mean and deviation taken out."""
    return np.ascontiguousarray(((picture.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1))
