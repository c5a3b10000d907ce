"""A photograph and its saliency -> the photograph's subject, with transparency around it. Needs PIL, NumPy and SciPy only.

Axes: S the side of the saliency network's square picture in pixels.
"""

from __future__ import annotations

import io

import numpy as np
from image_preprocessing import InvalidImage
from PIL import Image

# Saliency, from which a pixel counts as found. Below the largest value of a picture, the network saw nothing that stands out.
FOUND = 0.5
# A smaller part of the picture is a speck in a texture, and no subject.
LEAST_SHARE = 0.001
# Parts that are joined by levels from here on are one subject, such as a chair and its thin legs.
JOINED = 64
# Fainter levels are haze. They go, because the crop would otherwise hold all the picture in which the haze lies.
FAINTEST = 10
_MOST = 255
_HINT = (
    "hint: remove_background=False (in the shell --keep-background) takes the whole picture, or cut the subject out yourself"
)


def levels_for_network(picture: Image.Image, side: int) -> np.ndarray:
    """An RGB picture -> [1, 3, S, S] float32, levels of 0 to 255, S = `side`; the picture is squeezed into the square."""
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(small, np.float32).transpose(2, 0, 1)[None])


def mask_levels(saliency: np.ndarray) -> np.ndarray:
    """Saliency [S, S] -> uint8 [S, S], stretched so that the least is 0 and the largest 255."""
    low, high = float(saliency.min()), float(saliency.max())
    return (np.clip((saliency - low) / max(high - low, 1e-6), 0, 1) * _MOST).astype(np.uint8)


def resized(levels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Levels [S, S] -> the soft mask of a picture of `size`, width and height."""
    return Image.fromarray(levels).resize(size, Image.Resampling.LANCZOS)


def largest_subject(levels: np.ndarray) -> np.ndarray:
    """The levels [S, S] of the largest subject; 0 where another subject is nearer. Levels of a single subject stay as they are.

    Raises InvalidImage when there is no subject, or only specks.
    """
    from scipy import ndimage  # here, because most pictures that a server gets may have transparency

    parts, count = ndimage.label(levels >= JOINED)
    found = parts[levels >= FOUND * _MOST]  # the part of every pixel that is surely of a subject
    sizes = np.bincount(found, minlength=count + 1)
    largest = int(sizes[1:].argmax()) + 1 if count else 0
    if sizes[largest] < LEAST_SHARE * levels.size:
        raise nothing_found(f"at most {sizes[largest] / levels.size:.2%} of the picture")
    if count == 1:
        return levels
    nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    return np.where(parts[tuple(nearest)] == largest, levels, 0).astype(np.uint8)


def nothing_found(found: str) -> InvalidImage:
    """The error for a picture without a subject."""
    return InvalidImage(f"image must show a subject that stands out from its background, found {found}\n{_HINT}")


def cut_out(picture: Image.Image, saliency: np.ndarray) -> Image.Image:
    """An RGB picture and its saliency [S, S] -> RGBA: its largest subject, behind a soft mask. The colours stay as they are.

    Raises InvalidImage when there is no subject.
    """
    if float(saliency.max()) < FOUND:
        raise nothing_found(f"a saliency of at most {float(saliency.max()):.2f}")
    mask = resized(largest_subject(mask_levels(saliency)), picture.size)
    found = picture.convert("RGBA")
    found.putalpha(mask.point([0 if level < FAINTEST else level for level in range(_MOST + 1)]))
    return found


def share(picture: Image.Image) -> float:
    """The part of a picture that is subject, 0 to 1: the mean of its mask, or 1 for a picture without transparency."""
    return float(np.asarray(picture.getchannel("A")).mean() / _MOST) if picture.mode == "RGBA" else 1.0


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file, made quickly rather than small."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
