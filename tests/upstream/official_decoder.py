"""The official code of the shape decoder as an oracle: a plugin of pytest, which the root conftest loads."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the client's tests need no torch
    import torch

    from hunyuan3d_export.shapevae import ShapeVAEConfig

_PARENTS = ("hy3dgen", "hy3dgen.shapegen", "hy3dgen.shapegen.models", "hy3dgen.shapegen.models.autoencoders")


@pytest.fixture(scope="session")
def official() -> Iterator[types.ModuleType]:
    """The official modules, below empty parents: the package's own parents would import mesh libraries."""
    package = importlib.machinery.PathFinder.find_spec("hy3dgen")  # on disk, whatever sys.modules holds
    if package is None or not package.submodule_search_locations:
        pytest.skip("hy3dgen is not installed: pip install --no-deps hy3dgen==2.0.2")
    root = Path(package.submodule_search_locations[0]).parent
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "hy3dgen"}
    for name in _PARENTS:
        parent = types.ModuleType(name)
        parent.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = parent
    yield importlib.import_module("hy3dgen.shapegen.models.autoencoders.model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "hy3dgen"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="session")
def build(official: types.ModuleType) -> Callable[..., Any]:
    """build(config, state, dtype, include_pi=False): the official VAE with these weights."""

    def make(config: ShapeVAEConfig, state: dict[str, torch.Tensor], dtype: torch.dtype, *, include_pi: bool = False) -> Any:
        model = official.ShapeVAE(num_latents=9, include_pi=include_pi, **dataclasses.asdict(config)).to(dtype)
        model.load_state_dict(state, strict=True)
        return model.requires_grad_(False).eval()

    return make
