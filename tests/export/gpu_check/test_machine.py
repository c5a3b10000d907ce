"""What the check says of the machine, with a stand-in for the driver's command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hunyuan3d_export.gpu_check.machine import at_clock, machine

GPU = torch.device("cuda", 1)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that answers for GPU 1 as nvidia-smi does."""
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\n[ "$1" = --id=1 ] && echo "580.95, 1755 MHz, 1980 MHz, 2619 MHz, 700.00 W, 41"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return command


def test_gpu_driver_cuda_and_clocks(nvidia_smi: Path) -> None:
    assert nvidia_smi.is_file()
    found = machine(GPU)
    assert (found["device"], found["CUDA"], found["driver_version"]) == ("A GPU", "13.0", "580.95")
    assert (found["clocks.sm"], found["clocks.max.sm"], found["power.limit"]) == ("1755 MHz", "1980 MHz", "700.00 W")
    assert at_clock(GPU) == " at 1755 MHz" and "torch" in found


@pytest.mark.parametrize("answer", ["exit 9", "echo; exit 1"])
def test_a_driver_that_does_not_answer_is_left_out(answer: str, nvidia_smi: Path) -> None:
    nvidia_smi.write_text(f"#!/bin/sh\n{answer}\n")
    assert machine(GPU)["device"] == "A GPU" and "driver_version" not in machine(GPU)
    assert at_clock(GPU) == ""


def test_on_a_cpu_there_is_no_driver() -> None:
    assert "CUDA" not in machine(torch.device("cpu")) and at_clock(torch.device("cpu")) == ""
