"""The attention table: its measurements, its printed text and its file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("attention_bench", ROOT / "bench" / "attention.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_measures_in_a_process_of_its_own(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (96,))
    monkeypatch.setattr(bench, "BACKENDS", {name: bench.BACKENDS[name] for name in ("standard", "sage")})
    (row,) = bench.measure_all(torch.device("cpu"))  # sage does not run on a CPU
    assert (row.length, row.backend) == (96, "standard") and row.time_s > 0


def test_lengths_that_do_not_fit_are_left_out(bench: ModuleType) -> None:
    assert bench._fits("chunked", 256, torch.device("cpu"))
    assert not bench._fits("standard", 10**6, torch.device("cpu"))


def test_table_has_ratios_to_standard_and_claims(bench: ModuleType) -> None:
    rows = [
        bench.Row(4096, "chunked", 2.0, 250.0),
        bench.Row(4096, "standard", 1.0, 2000.0),
        bench.Row(8192, "sdpa", 1.0, None),
    ]
    assert bench.table(rows) == [
        ("4096", "chunked", "2000.0 ms", "2.00", "250 MiB", "0.125", "scores 128 MiB, 1/8"),
        ("4096", "standard", "1000.0 ms", "1.00", "2000 MiB", "1.000", "scores 1 GiB"),
        ("8192", "sdpa", "1000.0 ms", "-", "-", "-", ""),
    ]


def test_document_keeps_its_text_and_replaces_its_table(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "attention.md"
    document.write_text((ROOT / "docs" / "attention.md").read_text())
    monkeypatch.setattr(bench, "DOCUMENT", document)
    monkeypatch.setattr(bench, "PICTURE", document.with_suffix(".png"))
    for time_s in (2.0, 3.0):
        bench.write_document([bench.Row(4096, "sdpa", time_s, 1.0)], "a machine")
    text = document.read_text()
    assert text.startswith("# Attention: which backend, when") and text.endswith("(attention.png)\n")
    assert "| 4096 | sdpa | 3000.0 ms |" in text and text.count("| 4096 | ") == 1
    assert document.with_suffix(".png").stat().st_size > 1000
