"""Clients of the environment's variables, which are those of the command."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import trustme

import hunyuan3d_client as h
from hunyuan3d_client.environment import Connection


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HUNYUAN3D_")]:
        monkeypatch.delenv(name)


def test_nothing_is_needed() -> None:
    connection = Connection.from_env()
    assert (connection.url, connection.tls, connection.headers) == ("localhost:8001", False, ())


def test_the_addresses_headers_and_timeout(kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kserve.restricted = True
    monkeypatch.setenv("HUNYUAN3D_URL", f"{kserve.url}, {kserve.url}")
    monkeypatch.setenv("HUNYUAN3D_HEADER", "Key: secret\nx-team: a: b\n")
    monkeypatch.setenv("HUNYUAN3D_TIMEOUT_S", "7.5")
    with h.Client.from_env(retries=0) as client:
        assert client.health().version == "9.9" and client._client._timeout_s == 7.5
        assert isinstance(client._client.transport, h.RoundRobin)
    assert kserve.questions[-1]["x-team"] == "a: b"

    async def main() -> None:
        async with h.AsyncClient.from_env() as client:
            assert (await client.health()).version == "9.9"

    asyncio.run(main())


def test_tls_by_each_of_its_variables(tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("client@example.org")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    files = {name: str(tmp_path / f"{name.lower()}.pem") for name in ("CA", "CERT", "KEY")}
    for given in ({"TLS": "1"}, {"CA": files["CA"]}, {"CERT": files["CERT"], "KEY": files["KEY"]}):
        connection = Connection.from_env({f"HUNYUAN3D_{name}": value for name, value in given.items()})
        assert connection.transport()._credentials is not None, given
    assert Connection.from_env({"HUNYUAN3D_TLS": "0"}).transport()._credentials is None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HUNYUAN3D_HEADER": "secret"}, "--header and HUNYUAN3D_HEADER must be 'name: value'"),
        ({"HUNYUAN3D_TLS": "maybe"}, "HUNYUAN3D_TLS must be 1 or 0"),
        ({"HUNYUAN3D_CERT": "cert.pem"}, "cert and key must be given together"),
        ({"HUNYUAN3D_TIMEOUT_S": "soon"}, "HUNYUAN3D_TIMEOUT_S must be a number"),
        ({"HUNYUAN3D_URL": "localhost"}, "add the port: localhost:8001"),
    ],
    ids=str,
)
def test_wrong_variables(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(h.InvalidInput) as error:
        h.Client.from_env()
    assert words in str(error.value) and "secret" not in str(error.value)
