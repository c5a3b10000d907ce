"""The encoder's Python runtime: requests of equal shape share an evaluation, bad ones are refused alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import batching
import numpy as np
import onnx_graph
import pytest

from hunyuan3d_client import contract

Export = Callable[..., Path]


Contexts = Callable[[list[np.ndarray]], list[np.ndarray | Exception]]


def loaded(folder: Path) -> Contexts:
    """The deployed encoder: pixels of several requests -> the context of each, or its error."""
    network = onnx_graph.Network(folder / contract.CONDITIONER / "model.onnx", onnx_graph.Options(threads=2), ["context"])
    inputs = batching.Inputs([{"name": "pixels"}], "pixels[1] in 1..4 views", network.fixed_sizes, np)

    def prepared(pixels: np.ndarray) -> batching.Tensors | Exception:
        try:
            return inputs.prepare({"pixels": pixels})
        except batching.InvalidInput as error:
            return error

    def contexts(requests: list[np.ndarray]) -> list[np.ndarray | Exception]:
        results = batching.evaluate([prepared(pixels) for pixels in requests], network.run, np)
        return [result if isinstance(result, Exception) else result["context"] for result in results]

    return contexts


def pixels(batch: int, views: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, views, 3, 518, 518), dtype=np.float32)


def test_neighbours_do_not_matter(exported: Export) -> None:
    subject = loaded(exported(views=4))
    spoilt = pixels(1, 1, seed=3)
    spoilt[0, 0, 0, 7, 7] = np.nan
    requests = [pixels(1, 1), pixels(1, 2, seed=1), spoilt, pixels(1, 1, seed=2), pixels(1, 5), pixels(0, 1)]
    found = subject(requests)
    messages = [str(result) if isinstance(result, Exception) else result.shape for result in found]
    assert messages == [
        (1, 1370, 1536),
        (1, 2740, 1536),
        "pixels must be finite, got NaN or Inf",
        (1, 1370, 1536),
        "pixels must be of 1 to 4 views, got shape [1, 5, 3, 518, 518]",
        "pixels must be of 1 to 4 views, got shape [0, 1, 3, 518, 518]",
    ]
    (alone,) = subject([requests[3]])
    np.testing.assert_allclose(found[3].astype(np.float32), alone.astype(np.float32), atol=8e-3)
    assert np.abs(found[3].astype(np.float32) - found[0].astype(np.float32)).max() > 0.5


def test_a_single_view_graph_takes_one(exported: Export) -> None:
    (refused,) = loaded(exported())([pixels(1, 2)])
    assert str(refused) == "pixels must be of 1 to 1 views, got shape [1, 2, 3, 518, 518]"


def test_a_missing_graph(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="graph must be deployed, found none at .*\nhint: hunyuan3d-export deploy"):
        loaded(tmp_path)
