"""`hunyuan3d-export`: weights -> ONNX -> model repository -> running server, one subcommand for each arrow."""

from __future__ import annotations

import logging
import sys

import typer

from hunyuan3d_client import Hunyuan3DError

from ..engine_from_onnx import BuildCancelled
from ..server.embedded import ServerStartError
from .artifacts import conditioner, engine, info, onnx, refit, verify
from .deployment import deploy, serve
from .options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISUSE, errors
from .quality import quality

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (onnx, conditioner, engine, refit, verify, deploy, serve, info, quality):
    app.command()(command)


def run() -> int:
    """Runs the command line; the exit code. Errors of input print one message and a hint, no traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hunyuan3d_export").setLevel(logging.INFO)
    try:
        app()  # ends in SystemExit, whose code is 2 for a wrong option and 130 after Ctrl-C
    except (ServerStartError, Hunyuan3DError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_FAILED
    except BuildCancelled as error:
        errors.print(str(error), markup=False, highlight=False)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_MISUSE
    return 0
