"""The command line and `make web`: every setting can be given, keys, one terminal for server and page."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hunyuan3d_gateway import cli, local
from hunyuan3d_gateway.gateway import Gateway
from hunyuan3d_gateway.settings import Settings

OTHER = {"str": "x:1", "int": "77", "float": "12.5", "Path": "elsewhere", "tuple[str, ...]": "10.0.0.0/8"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_every_setting_is_an_option_and_a_variable(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    field = next(field for field in dataclasses.fields(Settings) if field.name == name)
    found: list[Settings] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "serve_gateway", lambda gateway: found.append(gateway.settings))
    monkeypatch.setattr(cli, "Gateway", lambda settings: type("G", (), {"settings": settings})())
    option = f"--{name.replace('_', '-')}"
    value = OTHER.get(str(field.type))
    if name in ("max_body_bytes", "store_bytes"):
        value = str(2**21)
    runner = CliRunner()
    assert runner.invoke(cli.app, [option] if value is None else [option, value]).exit_code == 0
    assert runner.invoke(cli.app, [], env={f"HUNYUAN3D_GATEWAY_{name.upper()}": value or "1"}).exit_code == 0
    default = getattr(Settings(), name)
    assert [getattr(settings, name) != default for settings in found] == [True, True]
    assert getattr(found[0], name) == getattr(found[1], name)


def test_keys_from_the_command_line(tmp_path: Path) -> None:
    runner, where = CliRunner(), ["--data", str(tmp_path)]
    added = runner.invoke(cli.app, ["keys", "add", "alice", *where])
    assert added.exit_code == 0 and added.stdout.startswith("h3d_")
    assert runner.invoke(cli.app, ["keys", "list", *where]).stdout == "alice\n"
    assert runner.invoke(cli.app, ["keys", "remove", "alice", *where]).exit_code == 0
    assert runner.invoke(cli.app, ["keys", "list", *where]).stdout == ""


def test_the_parts_of_a_gateway_that_has_not_started(tmp_path: Path) -> None:
    gateway = Gateway(Settings(data=tmp_path))
    gateway.stop_taking()
    gateway.database.close()


@pytest.mark.served
@pytest.mark.slow
def test_one_terminal_for_server_and_page(endpoints: object, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`make web` runs this module: the address on stdout, and Ctrl-C ends both processes."""
    assert endpoints is not None
    repository = next(tmp_path_factory.getbasetemp().glob("gateway*/repository"))
    command = [sys.executable, "-m", local.__name__, "--repository", str(repository), "--port", "0", "--data", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    process.stdout.close()
