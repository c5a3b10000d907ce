"""`python -m hunyuan3d_export.gpu_check`: the command line of the check."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..manifest import versions_of
from .attention_rows import AttentionRows
from .evaluations import Evaluations
from .rows import Job, collect, table
from .sampling import Samplings
from .setting import Networks, Setting

_VERSIONS = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy", "cupy", "sageattention")


def jobs(setting: Setting) -> Iterator[Job]:
    """Yields a job for every row. The jobs that need the fewest packages come first."""
    networks = Networks(setting)
    evaluations, samplings = Evaluations(setting, networks), Samplings(setting, networks)
    yield from evaluations.rooflines()
    for preset in setting.presets:
        yield from evaluations.in_torch(preset)
        yield from samplings.jobs(preset)
    yield from AttentionRows(setting).jobs()
    for preset in setting.presets:
        yield from evaluations.in_onnxruntime(preset)
        yield from evaluations.in_tensorrt(preset)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every row passed or was skipped with a reason, 1 when a row failed, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hunyuan3d_export").setLevel(logging.INFO)
    logging.getLogger("hunyuan3d_export.server.embedded").setLevel(logging.WARNING)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("gpu-check: skipped, torch finds no GPU on this machine\n")
        return 0
    try:
        setting = Setting(
            device=torch.device(options.device),
            presets=tuple(options.preset or ("v2-mini", "v2-0")),
            build=options.build,
            steps=options.steps,
            attention_length=options.attention_length,
            row_s=options.row_s,
        )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    rows = collect(jobs(setting), limit_s=options.limit_s, report=options.report, machine=_machine(setting.device))
    sys.stdout.write(f"\n{', '.join(f'{name} {value}' for name, value in _machine(setting.device).items())}\n\n{table(rows)}")
    return 0 if all(row.passed for row in rows) else 1


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, **versions_of(*_VERSIONS)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Measure the denoiser on this machine's GPU and print one table."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs the same code, to test it")
    parser.add_argument("--preset", action="append", help="a base preset; repeatable; default v2-mini and v2-0")
    parser.add_argument("--limit-s", type=float, default=1500.0, help="seconds after which no further row begins")
    parser.add_argument("--row-s", type=float, default=8.0, help="seconds for the 5 to 50 timed calls of one row")
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampling")
    parser.add_argument("--attention-length", type=int, default=4096, help="L of the attention rows")
    parser.add_argument(
        "--build", type=Path, default=Path("build"), help="folder of PRESET-PRECISION/ artifacts, reused if they match"
    )
    parser.add_argument("--report", type=Path, default=Path("build") / "gpu-check.json", help="the rows as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
