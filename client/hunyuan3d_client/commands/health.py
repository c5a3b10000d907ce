"""The subcommand health."""

import dataclasses
from typing import Annotated

import typer

from .. import errors
from ..blocking import Client
from ..environment import DEFAULT_URL
from ..health_report import health_lines
from ..transport import Health
from . import connecting, console
from .options import Json, Url


@connecting.connects
def health(
    url: Url = DEFAULT_URL,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for each server.")] = 10.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="The settings of each model too.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each server has loaded, and from which file. Exit code 3 if a server is not ready."""
    states: list[tuple[str, Health | errors.Hunyuan3DError]] = []
    with console.reported():
        for each in url.split(","):
            with connecting.client(each) as client:
                states.append((each.strip(), _state(client, timeout_s)))
    for each, state in states:
        if isinstance(state, errors.Hunyuan3DError):
            if as_json:
                console.print_facts(
                    {"url": each, "live": False, "ready": False, "error": type(state).__name__, "message": str(state)},
                    as_json=True,
                )
            console.warn(f"{type(state).__name__}: {each}: {state}")
        elif as_json:
            console.print_facts({"url": each, **dataclasses.asdict(state)}, as_json=True)
        else:
            for line in health_lines(each, state, verbose=verbose):
                console.say(line)
    if not all(isinstance(state, Health) and state.live and state.ready for _, state in states):
        console.stderr.print("A server is not ready.\nhint: its log names the model that failed to load")
        raise typer.Exit(console.EXIT_CODES[errors.ModelNotReady])


def _state(client: Client, timeout_s: float) -> Health | errors.Hunyuan3DError:
    """A server's health, or why it cannot be told: one server that is down hides no other."""
    try:
        return client.health(timeout_s=timeout_s)
    except errors.InvalidInput:
        raise
    except errors.Hunyuan3DError as error:
        return error
