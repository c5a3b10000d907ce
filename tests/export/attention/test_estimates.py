"""Estimated memory: its formulas, and every form of call on every backend against the measured peak."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hunyuan3d_export.attention import Call, estimate_bytes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("attention_estimates", ROOT / "bench" / "attention_estimates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's high-water mark")
def test_every_form_on_every_backend_is_within_one_and_a_half_of_the_peak(bench: ModuleType) -> None:
    rows = bench.measure_all(512, 640)
    assert {row.backend for row in rows} == set(bench.BACKEND_NAMES) and {row.form for row in rows} == set(
        map(str, bench.FORMS)
    )
    assert all(row.measured_bytes for row in rows)
    assert [row for row in rows if row.ratio > bench.MOST_RATIO] == []


def test_the_call_counts() -> None:
    q, k = torch.empty(2, 16, 4096, 64, device="meta"), torch.empty(2, 16, 1024, 64, device="meta")
    output, scores = 2 * q.numel() * 4, 2 * 16 * 4096 * 1024 * 4

    def beyond(backend: str, dropout: float = 0.0, chunk_size: int = 512) -> int:
        return estimate_bytes(backend, q, k, k, Call(None, None, False, dropout, chunk_size)) - output

    assert beyond("standard") == 2 * scores and beyond("standard", dropout=0.1) == 4 * scores
    assert beyond("chunked") == scores // 4 and beyond("chunked", dropout=0.1, chunk_size=256) == scores // 4
    assert beyond("chunked", chunk_size=10**6) == 2 * scores
    full = torch.empty(2, 16, 4096, 1024, dtype=torch.bool, device="meta")
    masked = Call(None, full, False, 0.0, 512)
    assert estimate_bytes("standard", q, k, k, masked) == output + 3 * scores
    bias = Call(torch.empty(1024, device="meta"), None, False, 0.0, 512)
    assert estimate_bytes("standard", q, k, k, bias) == output + 2 * scores


@pytest.mark.parametrize(
    ("measured", "estimated", "ratio"), [(200, 100, 2.0), (100, 200, 2.0), (0, 50, 50.0), (None, 50, None)]
)
def test_ratio_is_of_the_larger_to_the_smaller(
    bench: ModuleType, measured: int | None, estimated: int, ratio: float | None
) -> None:
    assert bench.Row("a form", "sdpa", measured, estimated).ratio == ratio


def test_document_keeps_its_text_and_replaces_its_table(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "attention.md"
    document.write_text((ROOT / "docs" / "attention.md").read_text())
    monkeypatch.setattr(bench, "DOCUMENT", document)
    for mib in (3, 4):
        bench.write_document([bench.Row("a form", "standard", mib * 2**20, 5 * 2**20)], (2, 3))
    assert "| a form | - | - | - | 4 / 5 |" in document.read_text() and document.read_text().count("a form") == 1
    assert document.read_text().startswith("# Attention: which backend, when")
