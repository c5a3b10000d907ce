"""torchvision's own transforms: pictures.npz (uint8 [H, W, 3] each) -> recipe.npz.

For each picture and size P, recipe.npz holds 'NAME SIZE' (uint8 [P, P, 3]) and 'NAME SIZE normalised' (float32 [3, P, P]).
This script runs in a process of its own. torchvision's wheel is made for a CUDA torch, so its operators do not load beside a
CPU build of torch. The transforms need none of them, but torchvision can be imported only if two of them are declared.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image

SIZES = (518, 1022)


def main(folder: str, pictures: str, recipe: str) -> None:
    sys.path.insert(0, folder)
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import transforms

    cubic = transforms.InterpolationMode.BICUBIC
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    found: dict[str, np.ndarray] = {}
    with np.load(pictures) as named:
        for name in named:
            for size in SIZES:
                square = transforms.Compose([transforms.Resize(size, cubic, antialias=True), transforms.CenterCrop(size)])
                picture = square(Image.fromarray(named[name]))
                found[f"{name} {size}"] = np.asarray(picture)
                found[f"{name} {size} normalised"] = normalise(picture).numpy()
    np.savez(recipe, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
