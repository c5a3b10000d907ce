"""Entry point of the `hunyuan3d` command. The command itself, cli.py, needs the extra `cli`."""

import signal
import sys
from types import FrameType

from .install import install_hint


def main() -> None:
    """Run the command, or say which package it needs and how to install it."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich", "safetensors"):
            raise
        sys.stderr.write(f"This command needs {missing}, which is not installed.\nhint: {install_hint('cli')}\n")
        raise SystemExit(2) from error
    signal.signal(signal.SIGTERM, _end)
    app()


def _end(number: int, _: FrameType | None) -> None:
    """End by an exception, so that half-written files are removed and the server is told."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
