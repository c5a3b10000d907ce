"""The files of a check are written after each row; the picture is drawn where matplotlib is installed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hunyuan3d_export.gpu_check.report import Report
from hunyuan3d_export.gpu_check.rows import Row


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json", {"device": "A GPU", "torch": "2.13"})


ROWS = [
    Row(part="evaluation", name="x", time_ms=4.0, roofline_ms=3.0, error=1e-3, tolerance=2e-3),
    Row(part="SDPA kernel", name="y", note="skipped: no GPU"),
    Row(part="build", name="z", time_ms=9e4),
]


def test_after_each_row_the_files_hold_all_rows(report: Report, tmp_path: Path) -> None:
    for count, row in enumerate(ROWS, 1):
        report.add(row)
        content = json.loads((tmp_path / "report.json").read_text())
        assert content["machine"] == {"device": "A GPU", "torch": "2.13"}
        assert [each["name"] for each in content["rows"]] == [each.name for each in ROWS[:count]]
        table = (tmp_path / "report.txt").read_text()
        assert table.startswith("device A GPU, torch 2.13\n\npart ") and table.count("\n") == 4 + count


def test_the_picture_can_be_drawn_from_the_json_later(report: Report, tmp_path: Path) -> None:
    for row in ROWS:
        report.add(row)
    command = [sys.executable, "-m", "hunyuan3d_export.gpu_check.report", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "report.png"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_no_row_was_measured(report: Report, tmp_path: Path) -> None:
    report.add(ROWS[1])
    report.draw()
    assert (tmp_path / "report.png").is_file()


def test_without_matplotlib_it_says_how(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report.add(ROWS[0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO):
        report.draw()
    assert f"elsewhere: python -m hunyuan3d_export.gpu_check.report {tmp_path / 'report.json'}" in caplog.text
