"""Full-size networks are exported within bounds of time and memory, in processes of their own; v2-0 is then verified."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hunyuan3d_export.files import RTX_PLAN_FILE

# The bounds on two cores: 10 minutes, and 10 GB of memory for fp32 or half of it for fp16.
_MOST_SECONDS = 600
_MOST_BYTES = {"fp32": 10e9, "fp16": 5e9}
# The command line, which also reports its peak memory when it ends. Not ru_maxrss, which a child inherits from the process that forks it.
_EXPORT = """
import atexit, sys
peak_kib = lambda: next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
atexit.register(lambda: sys.stderr.write("peak_kib=" + peak_kib()))
from hunyuan3d_export.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_v2_0_exports_within_bounds_and_agrees_with_torch(precision: str, tmp_path: Path) -> None:
    options = ["--preset", "v2-0", "--graph", "plain", "--precision", precision, "--out", str(tmp_path)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, "onnx", *options],
        check=True,
        timeout=2 * _MOST_SECONDS,
        stderr=subprocess.PIPE,
        text=True,
    )
    took_s = time.monotonic() - start
    peak_bytes = 1024 * int(done.stderr.rpartition("peak_kib=")[2])
    assert took_s <= _MOST_SECONDS
    assert peak_bytes <= _MOST_BYTES[precision]
    if precision == "fp16":
        command = [sys.executable, "-m", "hunyuan3d_export", "verify", "--artifacts", str(tmp_path)]
        verified = subprocess.run(command, timeout=2000)
        receipt = json.loads((tmp_path / "hunyuan3d_dit" / "parity.json").read_text())
        assert verified.returncode == 0, receipt
        assert all(check["passed"] for check in receipt["checks"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("preset", ["v2-0", "v2-0-turbo"])
def test_shape_decoders_export_and_compile_within_bounds(preset: str, tmp_path: Path) -> None:
    graphs, plans = str(tmp_path / "onnx"), str(tmp_path / "plans")
    capabilities = [word for name in ("SM89", "SM120") for word in ("--compute-capability", name)]
    for command in (
        ["vae", "--preset", preset, "--precision", "fp16", "--out", graphs],
        ["engine", "--onnx", graphs, "--out", plans, "--target", "tensorrt-rtx", *capabilities],
    ):
        arguments = [sys.executable, "-c", _EXPORT, *command]
        done = subprocess.run(arguments, check=True, timeout=_MOST_SECONDS, stderr=subprocess.PIPE, text=True)
        assert 1024 * int(done.stderr.rpartition("peak_kib=")[2]) <= _MOST_BYTES["fp16"] / 2
    models = ("hunyuan3d_vae", "hunyuan3d_field")
    sizes = {model: (tmp_path / "plans" / model / RTX_PLAN_FILE).stat().st_size for model in models}
    assert 350e6 < sizes["hunyuan3d_vae"] < 500e6 and 2e6 < sizes["hunyuan3d_field"] < 40e6
