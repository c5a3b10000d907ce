"""The check of a GPU machine, run here on the CPU by the same code, with the packages such a machine may lack blocked."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan3d_export.dit import PRESETS, DiTConfig
from hunyuan3d_export.gpu_check import __main__ as gpu_check
from hunyuan3d_export.gpu_check.rows import Job, Row, Skip, cells, collect, table
from hunyuan3d_export.gpu_check.setting import OneAtATime, flop, inputs_of

# Some GPU machines have only torch, einops, numpy, onnx, onnxruntime and what these need, so the others are blocked.
BLOCKED = (
    "tritonclient", "grpc", "typer", "rich", "safetensors", "onnxscript", "pytriton", "psutil", "matplotlib", "scipy", "skimage",
    "PIL", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "hypothesis",
)  # fmt: skip
MICRO = DiTConfig(
    in_channels=64, context_in_dim=1536, hidden_size=128, mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=1,
    guidance_embed=False,
)  # fmt: skip
PRELUDE = f"""
import dataclasses, importlib.machinery as machinery, sys

found = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {BLOCKED!r} else found(name, path, target)
machinery.PathFinder.find_spec = find_spec

from hunyuan3d_export.dit import PRESETS, DiTConfig
from hunyuan3d_export.gpu_check.__main__ import main
PRESETS["micro"] = dataclasses.replace(PRESETS["tiny"], name="micro", config={MICRO!r}, num_latents=24, context_tokens=37)
"""
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> str:
    preset = dataclasses.replace(PRESETS["tiny"], name="micro", config=MICRO, num_latents=24, context_tokens=37)
    monkeypatch.setitem(PRESETS, "micro", preset)  # type: ignore[arg-type]  # a dict behind its Mapping
    return "micro"


def options(tmp_path: Path, *more: str) -> list[str]:
    report = ["--build", str(tmp_path / "build"), "--report", str(tmp_path / "report.json")]
    small = ["--device", "cpu", "--preset", "micro", "--steps", "4", "--attention-length", "64", "--row-s", "0.01"]
    return [*small, *report, *more]


def rows_of(tmp_path: Path) -> list[dict[str, object]]:
    return list(json.loads((tmp_path / "report.json").read_text())["rows"])


def test_runs_with_the_packages_of_a_bare_gpu_machine(tmp_path: Path) -> None:
    code = f"{PRELUDE}\nsys.exit(main({options(tmp_path)!r}))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = {str(row["name"]): row for row in rows_of(tmp_path)}
    for path in ("plain", "two-batch", "guided"):
        for precision in ("fp32", "fp16", "bf16"):
            row = rows[f"micro {path}, torch {precision}"]
            assert row["passed"] and float(str(row["time_ms"])) > 0 and float(str(row["roofline_ms"])) > 0
    assert rows["micro, 4 steps, torch fp32, in this process"]["time_ms"]
    served = "skipped: the embedded server needs pytriton, tritonclient, safetensors"
    assert rows["micro, 4 steps, torch fp32, served by tritonserver"]["note"] == served
    assert "needs onnxscript" in str(rows["micro guided, ONNX Runtime fp32"]["note"])
    assert all(name in done.stdout for name in rows) and "of roofline" in done.stdout


@pytest.mark.slow
@pytest.mark.served
def test_every_row_that_a_cpu_can_have(tmp_path: Path, micro: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(options(tmp_path)) == 0
    rows = rows_of(tmp_path)
    unmeasured = {str(row["name"]) for row in rows if row["time_ms"] is None and row["part"] != "matmul"}
    sage = {"sage, L 64, 16 heads of 64"} if importlib.util.find_spec("sageattention") is None else set()
    assert unmeasured == {str(row["name"]) for row in rows if "TensorRT" in str(row["name"])} | sage
    served = next(row for row in rows if "served by tritonserver" in str(row["name"]))
    assert "ms an evaluation" in str(served["note"])
    evaluations = [row for row in rows if row["part"] == "evaluation" and row["time_ms"] is not None]
    assert {f"{micro} {path}, ONNX Runtime fp32" for path in ("plain", "two-batch", "guided")} <= {
        str(row["name"]) for row in evaluations
    }
    assert all(float(str(row["error"])) <= float(str(row["tolerance"])) for row in evaluations)
    assert "served by tritonserver" in capsys.readouterr().out


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "hunyuan3d_export.gpu_check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gpu-check: skipped, torch finds no GPU on this machine\n", "")
    assert not list(tmp_path.iterdir())
    assert "$(BIN)/python -m hunyuan3d_export.gpu_check\n" in (root / "Makefile").read_text()


@pytest.mark.usefixtures("micro")
def test_no_row_begins_after_the_limit(tmp_path: Path) -> None:
    assert gpu_check.main(options(tmp_path, "--limit-s", "0")) == 0
    rows = rows_of(tmp_path)
    assert len(rows) > 20 and {row["note"] for row in rows} == {"skipped: the limit of 0 s has passed"}


def test_presets_with_guidance_embedded_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--preset", "v2-0-turbo", "--report", str(tmp_path / "report.json")]) == 2
    assert "preset must be one of" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_one_rows_failure_is_its_own(tmp_path: Path) -> None:
    def fail() -> Row:
        raise RuntimeError("out of memory\nand a long story")

    def skip() -> Row:
        raise Skip("no such package")

    jobs = [Job("a", "fails", fail), Job("a", "skips", skip), Job("b", "passes", lambda: Row(part="b", name="passes"))]
    rows = collect(jobs, limit_s=60, report=tmp_path / "report.json", machine={"device": "x"})
    assert [(row.note, row.passed) for row in rows] == [
        ("failed: out of memory", False),
        ("skipped: no such package", True),
        ("", True),
    ]
    assert [row["passed"] for row in rows_of(tmp_path)] == [False, True, True]


def test_table_shows_the_roofline_beside_the_time() -> None:
    row = Row(part="evaluation", name="x", time_ms=4.0, tflop=1.5, roofline_ms=3.0, error=2e-3, tolerance=1e-3)
    assert cells(row) == ("evaluation", "x", "4.00", "1.500", "3.00", "75%", "", "2.0e-03", "1e-03", "FAILED ")
    header, line, first = table([row]).splitlines()
    assert header.startswith("part") and set(line) == {"-"} and first.startswith("evaluation  x")


def test_one_at_a_time_keeps_one_and_tries_a_failure_once() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        if name == "broken":
            raise ValueError("cannot be made")
        return name

    kept = OneAtATime()
    assert [kept.get(name, lambda name=name: make(name)) for name in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be made"):
            kept.get("broken", lambda: make("broken"))
    assert made == ["a", "b", "a", "broken"]


def test_two_batch_is_the_condition_and_zeros(micro: str) -> None:
    plain, both = (inputs_of(PRESETS[micro], path, torch.device("cpu")) for path in ("plain", "two-batch"))
    assert torch.equal(both["latents"][0], both["latents"][1]) and torch.equal(both["context"][:1], plain["context"])
    assert not both["context"][1].any() and plain["context"].any()
    assert flop(PRESETS[micro], "two-batch", "fp16") == 2 * flop(PRESETS[micro], "plain", "fp16")
    assert flop(PRESETS[micro], "guided", "bf16") > flop(PRESETS[micro], "guided", "fp32")
    repeated = [flop(PRESETS[micro], "guided", precision, form="repeat") for precision in ("bf16", "fp32")]
    assert repeated[0] == repeated[1] > flop(PRESETS[micro], "guided", "fp32")
