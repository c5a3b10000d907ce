"""The types of options that several commands share, and the options of the client's methods as options of commands.

A module of commands that `takes` decorates must not postpone its annotations (no `from __future__ import annotations`): typer
reads them from signatures that `takes` has extended, where Python does not evaluate text.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .. import contract
from ..array_files import WRITTEN
from ..options import BatchOptions, expanded, options_of, show

Url = Annotated[
    str, typer.Option(envvar="HUNYUAN3D_URL", help="gRPC address HOST:PORT of the server, or of several with commas between.")
]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds to wait for the whole answer; left out: HUNYUAN3D_TIMEOUT_S, or 300.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Context = Annotated[
    Path, typer.Option(help="Condition tokens [T, 1536] or [B, T, 1536], float; .npy, or .npz or .safetensors with `context`.")
]
Output = Annotated[Path, typer.Option(help="Where the result goes, .npy or .safetensors; it appears whole or not at all.")]
MESH_SUFFIXES = tuple(f".{name}" for name in contract.MESH_FORMATS)
MeshOutput = Annotated[
    Path,
    typer.Option(help=f"Where the mesh goes; its ending names the format: {', '.join(MESH_SUFFIXES)}. Whole or not at all."),
]
AnyOutput = Annotated[
    Path,
    typer.Option(
        help=f"Where the result goes, whole or not at all: a mesh ({', '.join(MESH_SUFFIXES)}), or latents ({', '.join(WRITTEN)})."
    ),
]
KeepBackground = Annotated[
    bool, typer.Option("--keep-background", help="Encode the whole picture: the server would cut the subject out.")
]

F = TypeVar("F", bound=Callable[..., Any])
# Types of options on the command line, where they differ from Python's: an array is a file, and a seed is one number.
_SHELL_TYPES = {"latents": Path | None, "negative_context": Path | None, "seed": int}
# --header sends headers with every call, and --keep-background turns the removal off.
_NOT_IN_SHELL = {"headers", "progress", "remove_background"}
_NAMED_BY_THE_ENDING = {"format"}  # of --out, but a batch's --out is a folder


def takes(kind: type) -> Callable[[F], F]:
    """A decorator for a command of `**options`: it takes the options of `kind`, with their texts as help."""
    hidden = _NOT_IN_SHELL if kind is BatchOptions else _NOT_IN_SHELL | _NAMED_BY_THE_ENDING
    options = [
        dataclasses.replace(o, type=Annotated[_SHELL_TYPES.get(o.name, o.type), typer.Option(help=o.text)])
        for o in options_of(kind)
        if o.name not in hidden
    ]
    return lambda command: show(command, expanded(command, options))
