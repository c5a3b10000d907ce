"""The benchmark of the client measures a model that does not wait for a batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(root: Path) -> Any:
    """bench/client.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_client", root / "bench" / "client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmarked_model_does_not_wait_for_a_batch(
    bench: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    (config,) = bench._repository().glob("*/configs/cpu.pbtxt")
    delays = [line.strip() for line in config.read_text().splitlines() if "max_queue_delay" in line]
    assert delays == ["max_queue_delay_microseconds: 0"]


def test_a_config_without_a_delay_is_an_error(bench: Any) -> None:
    with pytest.raises(AssertionError, match="must set one queue delay, got 0"):
        bench._without_delay("dynamic_batching {}")
