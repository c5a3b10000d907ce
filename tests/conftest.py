"""Weights and artifacts that the tests share. torch is imported on first use: the client's tests need none of it."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["official_decoder"]
ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "test"  # safe to keep: an artifact is reused only if its manifest still matches
# The contract's channels and head size in the fewest, narrowest blocks.
MICRO = {
    "in_channels": 64,
    "context_in_dim": 1536,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
}


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


def weights_of_micro(*, seed: int = 0, distilled: bool = False) -> Any:
    """Weights of a checkpoint file, fp32, every parameter random."""
    from hunyuan3d_export.dit import DiTConfig, random_model, save_checkpoint
    from hunyuan3d_export.dit.weights import Weights

    path = CACHE / f"micro{'-distilled' if distilled else ''}-{seed}.safetensors"
    save_checkpoint(random_model(DiTConfig(**MICRO, guidance_embed=distilled), seed), path, dtype=None)
    return Weights(preset="v2-0-turbo" if distilled else None, checkpoint=path)


def exported(
    weights: Any = None,
    *,
    precision: str = "fp32",
    attention: str = "op",
    distilled: bool = False,
    seed: int = 0,
    choices: str = "",
) -> Path:
    """A folder with every graph of the given weights or else of the micro weights. Graphs that are there already are kept.

    choices: the network's own options, like guided_form=repeat,residual=fp32.
    """
    from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx

    if weights is None:
        out = CACHE / f"{'distilled' if distilled else 'base'}-{precision}-{attention}-{seed}"
        weights = weights_of_micro(seed=seed, distilled=distilled)
    else:
        out = CACHE / f"{weights.preset}-{precision}-{attention}"
    if choices:
        out = out.with_name(f"{out.name}-{choices}")
    options = dict(choice.split("=") for choice in choices.split(",") if choice)
    export_onnx(weights, out, options=OnnxOptions(precision=precision, attention=attention, choices=options))
    return out


@pytest.fixture(scope="session")
def micro_weights() -> Callable[..., Any]:
    """micro_weights(seed=0, distilled=False)."""
    return weights_of_micro


@pytest.fixture(scope="session")
def micro(micro_weights: Callable[..., Any]) -> Any:
    """Weights of the base model."""
    return micro_weights()


@pytest.fixture(scope="session")
def micro_distilled(micro_weights: Callable[..., Any]) -> Any:
    """Weights of the guidance-distilled model."""
    return micro_weights(distilled=True)


@pytest.fixture(scope="session")
def artifacts() -> Callable[..., Path]:
    """artifacts(weights=None, precision="fp32", attention="op", distilled=False, seed=0, choices=""): `exported`, cached per session."""
    return functools.cache(exported)


class Background:
    """A trajectory that a thread follows. `progress` is its latest step, None before the first."""

    def __init__(self, client: Any, *arguments: Any, **options: Any) -> None:
        self.progress: Any = None
        self._stream = client.stream(*arguments, **options)
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = pool.submit(self._follow)
        pool.shutdown(wait=False)

    def _follow(self) -> Any:
        for step in self._stream:
            self.progress = step
        return self.progress.latents

    def result(self, *, timeout_s: float) -> Any:
        return self._future.result(timeout_s)

    def cancel(self) -> bool:
        """Stop the trajectory; whether it was running."""
        running = not self._future.done()
        self._stream.close()
        return running


@pytest.fixture(scope="session")
def background() -> type[Background]:
    return Background
