"""The `hunyuan3d` command: health, denoise, sample, decode, cutout, generate, batch."""

import importlib.metadata
from typing import Annotated

import typer

from .commands import console
from .commands.connecting import connects
from .commands.console import EXIT_CODES
from .commands.health import health
from .commands.latents import decode, denoise, sample
from .commands.pictures import batch, cutout, generate

__all__ = ["EXIT_CODES", "app"]

_EXITS = (
    "Exit codes: 0 done; 2 bad usage, input or file; 3 server unavailable or model not ready; 4 overloaded; "
    "5 deadline passed; 6 model failed; 130 cancelled. Of batch: 1 a picture failed; 130 and 143 stopped by Ctrl-C and SIGTERM."
)

app = typer.Typer(no_args_is_help=True, help=f"Talk to a Hunyuan3D-2 Triton server.\n\n{_EXITS}")


def _print_version(wanted: bool) -> None:
    if wanted:
        console.stdout.print(importlib.metadata.version("hunyuan3d-triton"), highlight=False)
        raise typer.Exit


@app.callback()
@connects
def connection(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    pass


for command in (health, denoise, sample, decode, cutout, generate, batch):
    app.command()(command)
