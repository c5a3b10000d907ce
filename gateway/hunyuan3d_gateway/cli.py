"""The command `hunyuan3d-gateway`: serve, and the keys of callers.

Annotations are not postponed here (no `from __future__ import annotations`): typer reads them from a signature that is made here.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn
from rich.console import Console

from hunyuan3d_client import Hunyuan3DError
from hunyuan3d_client.options import Option, expanded, show

from . import keys
from .app import create_app
from .database import Database
from .gateway import Gateway
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
    settings = _settings(options)
    gateway = Gateway(settings)
    proxies = list(settings.trusted_proxy)
    config = uvicorn.Config(
        create_app(gateway), host=settings.host, port=settings.port, log_config=None, access_log=False,
        proxy_headers=bool(proxies), forwarded_allow_ips=proxies or None, server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)), lifespan="on",
    )  # fmt: skip
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.require_key:
        logging.getLogger(__name__).warning(
            "whoever reaches %s may use this gateway, unless a key exists: hunyuan3d-gateway keys add NAME", settings.host
        )
    _Server(config, gateway).run()


class _Server(uvicorn.Server):
    """Says where it listens, and stops taking jobs with the first signal."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            stdout.print(f"http://{f'[{host}]' if ':' in host else host}:{port}", markup=False, highlight=False, soft_wrap=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._gateway.stop_taking()
        super().handle_exit(sig, frame)


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
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.INFO)
    for name in ("hunyuan3d_client", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
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
