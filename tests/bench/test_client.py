"""The benchmark of the client measures a model that does not wait for a batch."""

from __future__ import annotations

import importlib.util
import shutil
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
    assert delays == [], "a config without a delay means that no request waits for others"


def test_a_config_with_a_delay_is_an_error(bench: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(root / "model_repository" / "hunyuan3d_dit", tmp_path / "model_repository" / "hunyuan3d_dit")
    config = tmp_path / "model_repository" / "hunyuan3d_dit" / "configs" / "cpu.pbtxt"
    config.write_text(
        config.read_text().replace("dynamic_batching {", "dynamic_batching {\n  max_queue_delay_microseconds: 500")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "BUILD", tmp_path / "build")
    with pytest.raises(AssertionError, match="would be measured with its wait"):
        bench._repository()
