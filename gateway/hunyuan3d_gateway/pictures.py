"""Pictures of callers: looked at, decoded and written anew, so that nothing of a caller's file but its pixels goes further."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .failures import Refused, refused

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_SIDE = 4096  # longer sides are reduced: the image encoder sees 518 or 1022 pixels
_MOST_RATIO = 16
_HINT = "Use a PNG, JPEG or WebP picture."
_DATA_URI = re.compile(r"data:[\w.+/-]*;base64,", re.ASCII)


def cleaned(data: bytes, *, max_pixels: int) -> bytes:
    """The PNG file of a picture's pixels: 8 bits, turned as its EXIF data say. Blocking. Raises Refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes, which are checked here
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check(image, max_pixels)
                image.load()
                picture = _eight_bit(ImageOps.exif_transpose(image))
        except Refused:
            raise
        except UnidentifiedImageError as error:
            raise refused(422, "not_a_picture", "This file is not a picture that can be read.", _HINT) from error
        except Exception as error:  # decoders raise errors of many kinds for damaged files
            text = "This picture is damaged or not complete."
            raise refused(422, "damaged_picture", text, "Save it again with another program, or take another one.") from error
    if max(picture.size) > MOST_SIDE:
        picture.thumbnail((MOST_SIDE, MOST_SIDE))
    out = io.BytesIO()
    picture.info.clear()  # colour profiles and the like
    picture.save(out, format="PNG", compress_level=1)
    return out.getvalue()


def _check(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        text = f"This picture is too large: {width} x {height} pixels, at most {max_pixels / 1e6:g} million are allowed."
        raise refused(422, "too_many_pixels", text, "Make it smaller.")
    if max(image.size) > _MOST_RATIO * min(image.size):
        raise refused(422, "too_thin", f"This picture is too thin: {width} x {height} pixels.", "Cut it to the object.")
    if image.format != "JPEG" and getattr(image, "is_animated", False):
        raise refused(422, "animated_picture", "This picture is animated.", "Save one frame of it as a PNG file.")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip the values instead of scaling them
        grey = np.clip(np.asarray(image, np.float64) / 257, 0, 255).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    if picture.getchannel("A").getbbox() is None:
        raise refused(422, "empty_picture", "This picture shows nothing: all of it is transparent.", "Take another one.")
    return picture


def from_base64(text: str) -> bytes:
    """The bytes of base64, bare or in a data URI. Raises Refused."""
    start = _DATA_URI.match(text[:100])
    try:
        return base64.b64decode("".join(text[start.end() if start else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(422, "not_base64", "The picture must be base64 text.", _HINT) from error
