"""`python -m hunyuan3d_export.gpu_check`: the command line of the check."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .children import rows_of, start_server
from .groups import Group, groups
from .machine import machine
from .report import Report
from .setting import Setting

# A CPU run tests nothing but the code: one timed call a row, few steps, a short sequence.
_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"row_s": 2.0, "steps": 50, "attention_length": 4096},
    "cpu": {"row_s": 0.0, "steps": 4, "attention_length": 512},
}


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every row passed or was skipped with a reason, 1 when a row failed, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hunyuan3d_export").setLevel(logging.INFO)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("gpu-check: skipped, torch finds no GPU on this machine\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        try:
            setting = Setting(
                device=torch.device(options.device),
                presets=tuple(options.preset or ("v2-0", "v2-mini")),
                build=options.build,
                graphs=options.graphs,
                work=Path(work),
                **_sizes(options),
            )
            chosen = _chosen(groups(setting), options.only)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        report = _check(setting, chosen, options)
    sys.stdout.write(f"\n{report.text()}")
    return 0 if all(row.passed for row in report.rows) else 1


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The options that are smaller on a CPU, each with its default if it was not given."""
    given = {name: getattr(options, name) for name in _SIZES[options.device]}
    return {**_SIZES[options.device], **{name: value for name, value in given.items() if value is not None}}


def _chosen(known: list[Group], only: list[str] | None) -> list[Group]:
    """The groups whose names begin with one of `only`; all of them without it. Raises ValueError where no group does."""
    if unknown := [name for name in only or [] if not any(group.name.startswith(name) for group in known)]:
        names = "; ".join(group.name for group in known)
        raise ValueError(f"--only must begin the name of a group, got {', '.join(unknown)}\nhint: the groups are {names}")
    return [group for group in known if only is None or group.name.startswith(tuple(only))]


def _check(setting: Setting, chosen: list[Group], options: argparse.Namespace) -> Report:
    limit_s, group_s = options.limit_s, options.group_s
    report = Report(options.report, machine(setting.device))
    start = time.monotonic()
    start_server()
    for group in chosen:
        left_s = start + limit_s - time.monotonic()
        limit = (
            f"the limit of {limit_s:g} s has passed" if left_s <= group_s else f"the group's limit of {group_s:g} s has passed"
        )
        for row in rows_of(group, setting, deadline=time.monotonic() + min(left_s, group_s), limit=limit):
            report.add(row)
    report.draw()
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Measure the denoiser on this machine's GPU and print one table."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs the same code, to test it")
    parser.add_argument("--preset", action="append", help="a base preset; repeatable; default v2-0 and v2-mini")
    parser.add_argument("--only", action="append", help="the start of a group's name, such as served; repeatable; default all")
    parser.add_argument("--limit-s", type=float, default=480.0, help="seconds after which nothing runs any more")
    parser.add_argument("--group-s", type=float, default=240.0, help="seconds after which one group of rows is ended")
    cuda, cpu = _SIZES["cuda"], _SIZES["cpu"]
    for option, name, kind, meaning in (
        ("--row-s", "row_s", float, "seconds for the 5 to 50 timed calls of one row"),
        ("--steps", "steps", int, "steps of the sampling"),
        ("--attention-length", "attention_length", int, "L of the attention rows"),
    ):
        parser.add_argument(option, type=kind, help=f"{meaning}; default {cuda[name]}, on a cpu {cpu[name]}")
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder for exports and plans, reused if they match")
    parser.add_argument(
        "--graphs", type=Path, default=Path("build") / "gpu-check-graphs", help="folder that make gpu-check-graphs filled"
    )
    parser.add_argument(
        "--report", type=Path, default=Path("build") / "gpu-check.json", help="the rows as JSON; .txt and .png lie beside it"
    )
    return parser


def _stop(number: int, _frame: object) -> None:
    """Ends the check by an exception, so that the process of the group that runs is ended too. A second signal changes nothing."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
