"""The options of the connection, which stand before a command or after it, and the client that they make."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from ..blocking import Client
from ..environment import Connection, timeout_s_from_env
from ..options import show
from .console import reported

F = TypeVar("F", bound=Callable[..., Any])
_connection: contextvars.ContextVar[Connection] = contextvars.ContextVar("connection")
_PANEL = "Connection"
# The options of the connection: before the command, and after each command too.
_CONNECTING: Mapping[str, tuple[Any, Any]] = {
    "header": (
        Annotated[
            list[str],
            typer.Option(
                help="'name: value', sent with every call: a token, the server's key. Repeatable; adds to HUNYUAN3D_HEADER.",
                rich_help_panel=_PANEL,
            ),
        ],
        (),
    ),
    "tls": (
        Annotated[bool, typer.Option("--tls", help="TLS with the authorities that gRPC trusts.", rich_help_panel=_PANEL)],
        False,
    ),
    "ca": (
        Annotated[
            Path | None,
            typer.Option(help="PEM of the authority behind the server's certificate: turns TLS on.", rich_help_panel=_PANEL),
        ],
        None,
    ),
    "cert": (
        Annotated[Path | None, typer.Option(help="PEM of your own certificate, for mutual TLS.", rich_help_panel=_PANEL)],
        None,
    ),
    "key": (Annotated[Path | None, typer.Option(help="PEM of the key of --cert.", rich_help_panel=_PANEL)], None),
}


def connects(command: F) -> F:
    """A decorator for a command: it takes the options of the connection, which add to those before the command."""

    @functools.wraps(command)
    def call(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in _CONNECTING}
        with reported():
            before = Connection.from_env() if command.__name__ == "connection" else _connection.get()
            headers = (*before.headers, *(given.pop("header") or ()))
            kept = {name: value for name, value in given.items() if value}
            _connection.set(dataclasses.replace(before, headers=headers, **kept))
        return command(**arguments)

    signature = inspect.signature(command)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in _CONNECTING.items()
    ]
    return show(cast(F, call), signature.replace(parameters=[*signature.parameters.values(), *options]))


def client(url: str) -> Client:
    """A client of one address, or of several servers with the same models, whose addresses have commas between."""
    transport = dataclasses.replace(_connection.get(), url=url).transport()
    return Client(transport=transport, timeout_s=timeout_s_from_env())
