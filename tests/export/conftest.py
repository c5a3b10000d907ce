"""Fixtures of all export tests: one thread for torch, and a stand-in for sageattention."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch gets one thread: with more, networks this small take six times as long on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A stand-in for the package sageattention, which records the options of its calls."""
    calls: list[dict[str, Any]] = []

    def sageattn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=options["is_causal"])

    package = types.ModuleType("sageattention")
    package.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", package)
    yield calls


@pytest.fixture
def no_sage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the import of sageattention fail."""
    monkeypatch.setitem(sys.modules, "sageattention", None)
