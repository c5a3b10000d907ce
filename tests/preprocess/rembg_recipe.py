"""rembg's own masks: pictures.npz (uint8 [H, W, 3] each) -> masks.npz (uint8 [H, W] each), by the model named in the arguments.

rembg wants a newer NumPy than the server's, so this script runs in a virtual environment of rembg's own: see
test_rembg.py. U2NET_HOME names the folder of its ONNX files.
"""

from __future__ import annotations

import sys

import numpy as np
import rembg
from PIL import Image


def main(model: str, pictures: str, masks: str) -> None:
    session = rembg.new_session(model, providers=["CPUExecutionProvider"])
    with np.load(pictures) as named:
        found = {
            name: np.asarray(rembg.remove(Image.fromarray(named[name]), session=session, only_mask=True)) for name in named
        }
    np.savez(masks, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
