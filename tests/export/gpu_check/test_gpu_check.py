"""The check of a GPU machine, run here on the CPU by the same code, with the packages such a machine may lack blocked."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.gpu_check import __main__ as gpu_check
from hunyuan3d_export.gpu_check import graphs
from hunyuan3d_export.gpu_check.evaluations import Evaluations
from hunyuan3d_export.gpu_check.graphs import Contents
from hunyuan3d_export.gpu_check.groups import groups
from hunyuan3d_export.gpu_check.paths import GUIDANCE_SCALE, GUIDED, GUIDED_FORMS, PATHS, PLAIN, TWO_BATCH
from hunyuan3d_export.gpu_check.rows import Job, Row, Skip, cells, table
from hunyuan3d_export.gpu_check.setting import Networks, OneAtATime, Setting
from hunyuan3d_export.gpu_check.stopwatch import Stopwatch

# Some GPU machines have only torch, einops, numpy, onnx, onnxruntime and what these need, so the others are blocked.
BLOCKED = (
    "tritonclient", "grpc", "typer", "rich", "safetensors", "onnxscript", "pytriton", "psutil", "matplotlib", "scipy", "skimage",
    "PIL", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "hypothesis",
)  # fmt: skip
# Python imports a module of this name at its start, also in every process that the check starts.
BLOCKER = f"""
import importlib.machinery as machinery

found = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {BLOCKED!r} else found(name, path, target)
machinery.PathFinder.find_spec = find_spec
"""
SMALL = ["--device", "cpu", "--preset", "tiny", "--steps", "4", "--attention-length", "64", "--row-s", "0.01"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """The settings of a check of `tiny` on the CPU."""
    folders = {name: tmp_path / name for name in ("build", "graphs", "work")}
    (tmp_path / "work").mkdir()
    device = torch.device("cpu")
    return Setting(device=device, presets=("tiny",), steps=4, attention_length=64, row_s=0.01, **folders)


@pytest.fixture(scope="session")
def packed(root: Path) -> Path:
    """The folder with the packed graphs of `tiny`, which are packed again when the code has changed."""
    folder = root / "build" / "test" / "gpu-check-graphs"
    for contents in (*(Contents("tiny", "fp32", form) for form in GUIDED_FORMS), Contents("tiny", "fp32", network="vae")):
        try:
            graphs.unpack(folder / f"{contents.name}.zip", contents, root / "build" / "test" / "gpu-check-unpacked")
        except (FileNotFoundError, Skip):
            graphs.pack(contents, folder)
    return folder


def options(tmp_path: Path, *more: str) -> list[str]:
    return [*SMALL, "--build", str(tmp_path / "build"), "--report", str(tmp_path / "report.json"), *more]


def rows_of(tmp_path: Path) -> list[dict[str, object]]:
    return list(json.loads((tmp_path / "report.json").read_text())["rows"])


def run_blocked(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    torchs_own = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"  # while torch.compile is imported
    warnings = ["-W", "error", "-W", torchs_own]
    command = [sys.executable, *warnings, "-m", "hunyuan3d_export.gpu_check", *options(tmp_path, *more)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)


def unmeasured(rows: list[dict[str, object]]) -> dict[str, str]:
    return {str(row["name"]): str(row["note"]) for row in rows if row["time_ms"] is None and row["part"] != "matmul"}


@pytest.mark.slow
def test_runs_with_the_packages_of_a_bare_gpu_machine(tmp_path: Path, packed: Path) -> None:
    done = run_blocked(tmp_path, "--graphs", str(packed))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    measured = {str(row["name"]) for row in rows if row["time_ms"] is not None}
    for path in PATHS:
        for runtime in ("torch fp32", "torch fp16", "torch bf16", "ONNX Runtime fp32"):
            assert f"tiny {path}, B 1, {runtime}" in measured
    assert "tiny, 4 steps, torch fp32, in one process" in measured
    notes = unmeasured(rows)
    assert all(note.startswith("skipped: ") for note in notes.values()), notes
    served = "skipped: the embedded server needs pytriton, tritonclient, safetensors"
    assert notes["tiny, 4 steps, torch fp32, served by tritonserver"] == served
    assert "no picture: matplotlib is missing" in done.stderr and not (tmp_path / "report.png").exists()
    assert all(str(row["name"]) in done.stdout for row in rows) and "of roofline" in done.stdout


@pytest.mark.slow
@pytest.mark.served
def test_every_row_that_a_cpu_can_have(tmp_path: Path, packed: Path, setting: Setting) -> None:
    assert gpu_check.main(options(tmp_path, "--graphs", str(packed))) == 0
    rows = rows_of(tmp_path)
    assert [(row["part"], row["name"]) for row in rows] == [
        (job.part, job.name) for group in groups(setting) for job in group.jobs
    ]
    sage = {"sage"} if importlib.util.find_spec("sageattention") is None else set()
    without = [name for name in unmeasured(rows) if "TensorRT" not in name and name.split(",")[0] not in sage]
    assert {name.split(",")[0] for name in without} == {"cuDNN", "efficient"}
    served = next(row for row in rows if "served by tritonserver" in str(row["name"]))
    assert "ms an evaluation" in str(served["note"])
    evaluations = [row for row in rows if row["part"] == "evaluation" and row["time_ms"] is not None]
    assert {"torch", "torch.compile", "ONNX Runtime"} == {
        str(row["name"]).split(", ")[2].rpartition(" ")[0] for row in evaluations
    }
    assert all(float(str(row["error"])) <= float(str(row["tolerance"])) for row in evaluations)
    assert (tmp_path / "report.txt").read_text().count("\n") == len(rows) + 4
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "hunyuan3d_export.gpu_check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gpu-check: skipped, torch finds no GPU on this machine\n", "")
    assert not list(tmp_path.iterdir())
    assert "$(BIN)/python -m hunyuan3d_export.gpu_check\n" in (root / "Makefile").read_text()


def test_nothing_starts_after_the_limit(tmp_path: Path, setting: Setting) -> None:
    assert gpu_check.main(options(tmp_path, "--limit-s", "0")) == 0
    rows = rows_of(tmp_path)
    assert {row["note"] for row in rows} == {"skipped: the limit of 0 s has passed"}
    assert len(rows) == sum(len(group.jobs) for group in groups(setting))


def test_sigterm_ends_the_processes_of_the_group_that_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hunyuan3d_export.gpu_check", "--device", "cpu", "--preset", "v2-mini"]
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = psutil.Popen([*command, "--report", str(tmp_path / "report.json")], cwd=tmp_path, **pipe)
    family = []
    try:
        assert "matmul" in process.stderr.readline(), "the first row, of a process whose group has two more"
        family = process.children(recursive=True)
        assert len(family) >= 3, "the server of processes, its tracker, and the process that measures"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        for each in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"row_s": 2.0, "steps": 50, "attention_length": 4096}),
        (["--device", "cpu"], {"row_s": 0.0, "steps": 4, "attention_length": 512}),
        (["--device", "cpu", "--row-s", "1", "--steps", "9"], {"row_s": 1.0, "steps": 9, "attention_length": 512}),
        (["--attention-length", "64", "--row-s", "0"], {"row_s": 0.0, "steps": 50, "attention_length": 64}),
    ],
)
def test_only_a_cpu_measures_less(arguments: list[str], expected: dict[str, float]) -> None:
    assert gpu_check._sizes(gpu_check._parser().parse_args(arguments)) == expected


def test_a_cpu_makes_one_timed_call_when_it_has_no_time() -> None:
    calls: list[int] = []
    for budget_s, most in ((0.0, 1), (10.0, 50)):
        calls.clear()
        assert Stopwatch(torch.device("cpu"), budget_s).median_ms(lambda: calls.append(1)) >= 0
        assert len(calls) == most


@pytest.mark.parametrize(("device", "compilers"), [("cuda", ["inductor"] * 3), ("cpu", ["inductor", "aot_eager", "aot_eager"])])
def test_a_gpu_compiles_every_path(setting: Setting, device: str, compilers: list[str]) -> None:
    setting = dataclasses.replace(setting, device=torch.device(device))
    evaluations = Evaluations(setting, Networks(setting))
    assert [evaluations._compiler(path) for path in (TWO_BATCH, *GUIDED)] == compilers


def test_groups_can_be_chosen_by_the_start_of_their_names(
    tmp_path: Path, setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(options(tmp_path, "--limit-s", "0", "--only", "served", "--only", "SDPA")) == 0
    chosen = [job.name for group in groups(setting) if group.name in ("SDPA", "served, tiny") for job in group.jobs]
    assert [row["name"] for row in rows_of(tmp_path)] == chosen
    assert gpu_check.main(options(tmp_path, "--only", "served", "--only", "plans")) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: --only must begin the name of a group, got plans\nhint: the groups are rooflines; torch, tiny;"
    )


def test_presets_with_guidance_embedded_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--preset", "v2-0-turbo", "--report", str(tmp_path / "report.json")]) == 2
    assert "preset must be one of" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_names_of_rows_differ_and_the_most_telling_come_first(setting: Setting) -> None:
    found = groups(setting)
    names = [(job.part, job.name) for group in found for job in group.jobs]
    assert len(names) == len(set(names))
    assert [group.name for group in found][:4] == ["rooflines", "torch, tiny", "SDPA", "TensorRT, tiny"]
    assert found[1].jobs[0].name == "tiny two-batch, B 1, torch fp32" and "mesh stage, tiny" in [group.name for group in found]
    for kernel in ("flash", "cuDNN", "efficient", "math"):
        for batch in (1, 2, 8):
            assert ("SDPA kernel", f"{kernel}, tiny (1498 tokens), B {batch}") in names
    for batch in (1, 2, 8):
        for path in (TWO_BATCH, *GUIDED):
            assert ("evaluation", f"tiny {path}, B {batch}, torch fp32") in names


def test_a_rows_failure_is_a_row() -> None:
    def fail() -> Row:
        raise RuntimeError("out of memory\nand a long story")

    def skip() -> Row:
        raise Skip("no such package")

    jobs = [Job("a", "fails", fail), Job("a", "skips", skip), Job("b", "passes", lambda: Row(part="b", name="passes"))]
    assert [(row.note, row.passed) for row in (job.measured() for job in jobs)] == [
        ("failed: out of memory", False),
        ("skipped: no such package", True),
        ("", True),
    ]


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


@pytest.mark.parametrize("batch", [1, 2])
def test_every_path_expects_what_two_batch_gives(batch: int) -> None:
    preset, device = PRESETS["tiny"], torch.device("cpu")
    both = TWO_BATCH.inputs(preset, device, batch=batch)
    assert not both["context"][batch:].any() and both["context"][:batch].any() and len(both["latents"]) == 2 * batch
    assert torch.equal(both["latents"][0], both["latents"][-1])
    conditional, unconditional = torch.randn(2, 1, 5, 64)
    velocities = torch.cat([conditional, unconditional])
    assert torch.equal(PLAIN.expected(velocities, batch=batch), conditional.expand(batch, -1, -1))
    guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
    for path in GUIDED:
        assert torch.equal(path.expected(velocities, batch=batch), guided.expand(batch, -1, -1))
        assert path.inputs(preset, device, batch=batch)["guidance_scale"].tolist() == [GUIDANCE_SCALE] * batch
        assert str(path) == f"guided ({path.form})"
    assert TWO_BATCH.flop(preset, "fp16", batch=batch) == 2 * batch * PLAIN.flop(preset, "fp16")


def test_a_guided_velocity_has_the_errors_of_both_velocities() -> None:
    """Errors drawn independently grow by as much as amplification says."""
    generator = torch.Generator().manual_seed(0)
    shared, conditional, unconditional, *errors = (torch.randn(1, 200, 64, generator=generator) for _ in range(5))
    exact = torch.cat([shared + 0.3 * conditional, shared + 0.4 * unconditional])
    found = exact * (1 + 1e-3 * torch.cat(errors))
    for path in (PLAIN, TWO_BATCH, *GUIDED):
        expected = 1e-3 * path.amplification(exact)
        assert relative_l2(path.expected(found), path.expected(exact)) == pytest.approx(expected, rel=0.05)
    assert GUIDED[0].amplification(exact) > 2 and PLAIN.amplification(exact) == TWO_BATCH.amplification(exact) == 1


def test_rows_beyond_a_plans_profile_say_so(setting: Setting) -> None:
    (group,) = (group for group in groups(setting) if group.name == "TensorRT, tiny")
    notes = {job.name: job.measured().note for job in group.jobs}
    assert notes["tiny two-batch, B 8, TensorRT fp32"] == "skipped: 16 rows are more than the 8 of a plan's profile"
    assert notes["tiny two-batch, B 2, TensorRT fp32"] == "skipped: TensorRT runs on a GPU, and this run is on cpu"
