"""`hunyuan3d-export`: weights -> ONNX -> model repository -> running server, with a subcommand for each step."""

from __future__ import annotations

import logging
import sys

import typer

from hunyuan3d_client import Hunyuan3DError

from ..engine_from_onnx import BuildCancelled
from ..introduction import INTRODUCTION
from ..server.embedded import ServerStartError
from .artifacts import background, conditioner, onnx, vae
from .deployment import deploy, serve
from .info import info
from .options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISUSE, errors
from .plans import engine, refit
from .quality import quality
from .verification import verify

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=INTRODUCTION)
for command in (onnx, conditioner, vae, background, engine, refit, verify, deploy, serve, info, quality):
    app.command()(command)


def run() -> int:
    """Runs the command line and returns its exit code. An error prints its message and hint, without a traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hunyuan3d_export").setLevel(logging.INFO)
    try:
        app()  # typer raises SystemExit: code 2 for a wrong option, 130 after Ctrl-C
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
