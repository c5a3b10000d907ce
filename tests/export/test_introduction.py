"""hunyuan3d-export tells what it does where torch is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hunyuan3d_export.introduction import introduction

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.argv = ["hunyuan3d-export", *sys.argv[1:]]
from hunyuan3d_export.__main__ import main
main()
"""


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_help_needs_no_torch(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "running Triton server" in done.stdout and "need torch" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_says_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "info"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "needs torch" in done.stderr and "hint: " in done.stderr


def test_it_lists_the_commands_of_the_program() -> None:
    from hunyuan3d_export.commands import app

    lines = [line.split(maxsplit=1) for line in introduction().partition("Commands:\n")[2].splitlines()]
    assert [name for name, _ in lines] == [command.callback.__name__ for command in app.app.registered_commands]
    assert all(text for _, text in lines)
