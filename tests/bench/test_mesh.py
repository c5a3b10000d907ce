"""The costs of a mesh that are promised: time and memory beside dense marching cubes, and the finest grid."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def bench(root: Path) -> Any:
    """bench/mesh.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_mesh", root / "bench" / "mesh.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_upstream_is_counted_with_its_own_rules(bench: Any) -> None:
    assert bench._halved(384) == [96, 192, 384] and bench._halved(256) == [64, 128, 256]
    sphere = bench.field_named("sphere", 128)
    ours, theirs, theirs_snapped = (bench.WAYS[way](sphere, 128) for way in ("follow", "hierarchical", "flashvdm"))
    assert theirs["evaluations"] > 65**3 and theirs_snapped["resolution"] == 126
    assert ours["evaluations"] < theirs["evaluations"] < 129**3


def test_growing_takes_all_neighbours(bench: Any) -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    assert bench._grown(mask).sum() == 27 and mask.sum() == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_time_and_memory_beside_dense_marching_cubes(bench: Any) -> None:
    ours, dense = (bench.measured(way, "chair", 384) for way in ("follow", "dense"))
    assert ours["faces"] == dense["faces"]
    assert ours["evaluations"] <= dense["evaluations"] / 60
    assert ours["peak_mb"] <= dense["peak_mb"] / 4
    assert bench.time_ratio("chair", 384) <= 0.5


@pytest.mark.slow
def test_the_finest_grid_is_affordable(bench: Any) -> None:
    figures = bench.measured("follow", "sphere", 1024)
    assert figures["evaluations"] < 1025**3 / 150 and figures["peak_mb"] < 1500
