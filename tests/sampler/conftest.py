"""Requests and settings for the sampler's plain modules, which `pythonpath` in pyproject.toml makes importable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from doubles import PARAMETERS
from parameters import parse
from sample_request import SampleRequest, decode
from settings import Settings


@pytest.fixture(scope="session")
def parameters() -> dict[str, str]:
    """The parameters of a config.pbtxt."""
    return dict(PARAMETERS)


@pytest.fixture(scope="session")
def base() -> Settings:
    return parse(Settings, PARAMETERS)


@pytest.fixture(scope="session")
def distilled() -> Settings:
    return parse(Settings, {**PARAMETERS, "guidance_embed": "true"})


@pytest.fixture(scope="session")
def tokens() -> Callable[..., np.ndarray]:
    """tokens(B, T, seed=0): a float16 context."""
    return lambda batch, length, seed=0: np.random.default_rng(seed).standard_normal((batch, length, 1536)).astype(np.float16)


@pytest.fixture(scope="session")
def request_for(base: Settings, tokens: Callable[..., np.ndarray]) -> Callable[..., SampleRequest]:
    """request_for(batch=1, latents=5, context=3, **tensors): a decoded request; numbers become tensors."""
    kinds = {
        "steps": np.int32,
        "num_latents": np.int32,
        "preview_every": np.int32,
        "guidance_scale": np.float32,
        "seed": np.int64,
    }

    def make(*, batch: int = 1, latents: int = 5, context: int = 3, **values: object) -> SampleRequest:
        tensors = {"context": tokens(batch, context)}
        for name, value in values.items():
            array = isinstance(value, np.ndarray)
            tensors[name] = value if array else np.array([value], kinds.get(name, np.object_))
        return decode(tensors, base, latents)

    return make
