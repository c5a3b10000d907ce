"""The command that adds an extra of this project to the environment that runs now."""

from __future__ import annotations

import shlex
import sys


def install_hint(extras: str) -> str:
    """Says how to install `extras`, such as "cli" or "export,rtx". No package index has this project: pip reads its folder."""
    return f"in the project's folder: {shlex.quote(sys.executable)} -m pip install --constraint constraints.txt '.[{extras}]'"
