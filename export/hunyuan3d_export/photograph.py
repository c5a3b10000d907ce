"""A real photograph as a stand-in condition: raw patches through a fixed random projection, until an image encoder is there.

It has the shape and the value range of the real thing, a DINOv2 sequence, and none of its meaning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hunyuan3d_client import contract

_CROP = 518
_PATCH = 14
_SEED = 14


def photograph_context() -> NDArray[np.float16]:
    """[1, 1370, 1536] float16 from the centre of scikit-image's astronaut: a mean token, then 37 x 37 patches in rows.

    Raises ImportError without scikit-image (extra `test`).
    """
    from skimage import data, transform

    image = transform.resize(data.astronaut(), (_CROP, _CROP), anti_aliasing=True)  # [518, 518, 3] in [0, 1]
    side = _CROP // _PATCH
    patches = image.reshape(side, _PATCH, side, _PATCH, 3).swapaxes(1, 2).reshape(side * side, -1)  # [1369, 588]
    patches = (patches - patches.mean()) / patches.std()
    tokens = np.concatenate([patches.mean(axis=0, keepdims=True), patches])  # [1370, 588]
    projection = np.random.Generator(np.random.Philox(key=_SEED)).standard_normal((tokens.shape[1], contract.CONTEXT_WIDTH))
    return (tokens @ projection / np.sqrt(tokens.shape[1])).astype(np.float16)[None]
