"""Image files -> the pixels that the image encoder takes. Needs PIL and NumPy only, and knows nothing of Triton.

Axes: V views, P the side of the square picture in pixels.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES = 32 * 2**20
# Limits the memory that a small file can unpack to: 67 MB for the picture, and as much again for the white canvas.
MOST_SIDE = 4096
MOST_RATIO = 16  # of the longer to the shorter side, because the whole picture is resized before its centre is taken
BORDER = 0.15  # the part of the canvas' side, both edges together, that stays white around a picture with alpha
WHITE = (255, 255, 255)
# The statistics of ImageNet, with which DINOv2 was trained.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


class InvalidImage(ValueError):
    """The bytes are not a picture that this model takes; the message says why."""


def pixels(images: Sequence[bytes], size: int) -> np.ndarray:
    """The views' files, in the order front, left, back, right -> [1, V, 3, P, P] float32, P = size, normalised.

    Raises InvalidImage; its message names the view if there are several.
    """
    views = []
    for index, data in enumerate(images):
        with naming_view(index, len(images)):
            views.append(normalise(square(decode(data), size)))
    return np.stack(views)[None]


@contextlib.contextmanager
def naming_view(index: int, count: int) -> Iterator[None]:
    """The InvalidImage of the body names the view, if there are several."""
    try:
        yield
    except InvalidImage as error:
        raise InvalidImage(f"view {index + 1}: {error}" if count > 1 else str(error)) from error


def decode(data: bytes) -> Image.Image:
    """A PNG, JPEG or WebP file -> 8-bit RGB, or RGBA if a part is transparent, rotated as its EXIF data say.

    Raises InvalidImage for another format, and for a file that is damaged, animated or too large.
    """
    if not 0 < len(data) <= MOST_BYTES:
        raise InvalidImage(f"image must be of 1 to {MOST_BYTES} bytes, got {len(data)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes, which are checked here, and of metadata, which are not used
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
        except Exception as error:  # the decoders raise errors of many kinds for damaged files
            raise InvalidImage(f"image must be a whole PNG, JPEG or WebP file, got: {error!r}") from error


def _check_header(image: Image.Image) -> None:
    if max(image.size) > MOST_SIDE:
        raise InvalidImage(f"image must be at most {MOST_SIDE} pixels wide and high, got {image.width} x {image.height}")
    # A JPEG file may hold more pictures, such as a depth map, and is not refused for them: the first is the photograph.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise InvalidImage(f"image must be a still picture, got {getattr(image, 'n_frames', 'several')} frames")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip the values instead of scaling them
        grey = np.clip(np.asarray(image, np.float64) / 257, 0, 255).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image if image.getextrema()[3] != (255, 255) else image.convert("RGB")


def square(image: Image.Image, size: int) -> np.ndarray:
    """RGB or RGBA -> uint8 [P, P, 3], P = `size`.

    An RGBA picture is first cropped to its visible part and centred on a white canvas. Then the shorter side is resized to `size`
    (bicubic, antialiased) and the centre is cut out.

    Raises InvalidImage for an RGBA picture without a visible part, and for an RGB picture that is a thin strip.
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
    """The visible part of an RGBA picture, centred on a white square, of whose side its longer side is 85 %."""
    visible = image.getchannel("A").getbbox()
    if visible is None:
        raise InvalidImage("image must show something, got an alpha channel of zeros")
    image = image.crop(visible)
    side = math.ceil(max(image.size) / (1 - BORDER))
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2), mask=image)
    return canvas


def normalise(picture: np.ndarray) -> np.ndarray:
    """uint8 [P, P, 3] -> float32 [3, P, P], less ImageNet's mean and divided by its deviation."""
    return np.ascontiguousarray(((picture.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1))
