"""The command `hunyuan3d-gateway`: serve, and the keys of callers.

Annotations are not postponed here (no `from __future__ import annotations`): typer reads them from a signature that is made here.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hunyuan3d_client import Hunyuan3DError
from hunyuan3d_client.options import Option, expanded, show

from . import keys
from .database import Database
from .gateway import Gateway
from .serving import log
from .serving import serve as serve_gateway
from .settings import Settings

_ENVIRONMENT = "HUNYUAN3D_GATEWAY_"
_TYPES: dict[str, Any] = {"tuple[str, ...]": list[str], "Path": Path, "int": int, "float": float, "bool": bool, "str": str}
_KEYED = ("data", "database")

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="A web page and HTTP interfaces in front of Hunyuan3D-2 servers.",
)
key_commands = typer.Typer(no_args_is_help=True, help="Keys of callers. Once one exists, every caller needs one.")
app.add_typer(key_commands, name="keys")
stdout, stderr = Console(), Console(stderr=True)


def _options(*names: str) -> list[Option]:
    """The fields of Settings (those that are named) as options of the command line."""
    found = []
    for field in dataclasses.fields(Settings):
        if names and field.name not in names:
            continue
        variable = _ENVIRONMENT + field.name.upper()
        kind: Any = Annotated[_TYPES[str(field.type)], typer.Option(help=field.metadata["text"], envvar=variable)]
        found.append(Option(field.name, kind, field.default, field.metadata["text"]))
    return found


def _takes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda command: show(command, expanded(command, _options(*names)))


def _settings(options: dict[str, Any]) -> Settings:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return Settings(**given)


@app.callback()
@_takes()
def serve(context: typer.Context, **options: Any) -> None:
    """Serve the page and the interfaces until SIGINT or SIGTERM. TLS and headers to the servers: the variables HUNYUAN3D_*."""
    if context.invoked_subcommand is not None:
        return
    serve_gateway(Gateway(_settings(options)))


@key_commands.command("add")
@_takes(*_KEYED)
def add_key(name: Annotated[str, typer.Argument(help="Of the caller, for the audit log.")], **options: Any) -> None:
    """Make a key and print it, this once: the database holds its SHA-256 alone."""
    stdout.print(keys.add(_database(options), name), markup=False, highlight=False, soft_wrap=True)


@key_commands.command("remove")
@_takes(*_KEYED)
def remove_key(name: Annotated[str, typer.Argument(help="Of the caller.")], **options: Any) -> None:
    """Make a caller's key worthless. Running gateways notice within seconds."""
    keys.remove(_database(options), name)


@key_commands.command("list")
@_takes(*_KEYED)
def list_keys(**options: Any) -> None:
    """Print the callers that have keys."""
    for name, _ in keys.names(_database(options)):
        stdout.print(name, markup=False, highlight=False, soft_wrap=True)


def _database(options: dict[str, Any]) -> Database:
    settings = Settings(**options)
    settings.data.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    database.create()
    return database


def run() -> int:
    """Run the command line and return its exit code. An error prints its message and hint, without a traceback."""
    log()
    try:
        app()
    except Hunyuan3DError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except OSError as error:
        stderr.print(
            f"error: {error}\nhint: another --port, or another --data folder", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    return 0
