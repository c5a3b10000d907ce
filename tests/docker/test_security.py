"""The promises of docs/security.md, tested on the real server with the entrypoint's flags."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from hunyuan3d_client import Client, GrpcTransport
from hunyuan3d_client.errors import ServerUnavailable

pytestmark = pytest.mark.served

KEY = "0123456789abcdef-a-test-key"
CONTEXT = np.ones((1, 3, 1536), np.float16)
GRPC_HEADER, HTTP_HEADER = "triton-grpc-protocol-hunyuan3d-key", "hunyuan3d-key"
# What only the operator may do, over gRPC and over HTTP (method, path).
ADMIN: dict[str, tuple[Callable[..., Any], tuple[str, str]]] = {
    "shared memory": (
        lambda client, **options: client.register_system_shared_memory("region", "/none", 8, **options),
        ("POST", "v2/systemsharedmemory/region/region/register"),
    ),
    "repository index": (
        lambda client, **options: client.get_model_repository_index(**options),
        ("POST", "v2/repository/index"),
    ),
    "load": (
        lambda client, **options: client.load_model("hunyuan3d_dit", **options),
        ("POST", "v2/repository/models/hunyuan3d_dit/load"),
    ),
    "unload": (
        lambda client, **options: client.unload_model("hunyuan3d_dit", **options),
        ("POST", "v2/repository/models/hunyuan3d_dit/unload"),
    ),
    "statistics": (lambda client, **options: client.get_inference_statistics(**options), ("GET", "v2/models/stats")),
    "server metadata": (lambda client, **options: client.get_server_metadata(**options), ("GET", "v2")),
    "model metadata": (
        lambda client, **options: client.get_model_metadata("hunyuan3d_dit", **options),
        ("GET", "v2/models/hunyuan3d_dit"),
    ),
    "model config": (
        lambda client, **options: client.get_model_config("hunyuan3d_dit", **options),
        ("GET", "v2/models/hunyuan3d_dit/config"),
    ),
    "trace": (lambda client, **options: client.get_trace_settings(**options), ("GET", "v2/trace/setting")),
    "logging": (lambda client, **options: client.get_log_settings(**options), ("GET", "v2/logging")),
}
# These fail even with the key: model control is off, and the region does not exist.
NEVER = {"load", "unload", "shared memory"}


@pytest.fixture(scope="module")
def guarded(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    key = tmp_path_factory.mktemp("secret") / "key"
    key.write_text(KEY)
    with run(API_KEY_FILE=str(key)) as container:
        container.wait_ready()
        yield container


@pytest.mark.parametrize("headers", [{}, {GRPC_HEADER: "wrong"}, {HTTP_HEADER: KEY}, {"authorization": KEY}], ids=str)
@pytest.mark.parametrize("action", ADMIN)
def test_grpc_is_refused_without_the_key(action: str, headers: dict[str, str], guarded: Any) -> None:
    with InferenceServerClient(guarded.grpc) as client, pytest.raises(InferenceServerException) as caught:
        ADMIN[action][0](client, headers=headers)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert "This protocol is restricted" in str(caught.value.message())


@pytest.mark.parametrize("action", sorted(set(ADMIN) - NEVER))
def test_grpc_with_the_key(action: str, guarded: Any) -> None:
    with InferenceServerClient(guarded.grpc) as client:
        assert ADMIN[action][0](client, headers={GRPC_HEADER: KEY}) is not None


@pytest.mark.parametrize("action", ["load", "unload"])
def test_model_control_is_off_even_with_the_key(action: str, guarded: Any) -> None:
    with InferenceServerClient(guarded.grpc) as client, pytest.raises(InferenceServerException) as caught:
        ADMIN[action][0](client, headers={GRPC_HEADER: KEY})
    assert "This protocol is restricted" not in str(caught.value.message())


def http(guarded: Any, method: str, path: str, headers: dict[str, str]) -> int:
    body = json.dumps({}).encode() if method == "POST" else None
    request = urllib.request.Request(f"http://{guarded.http}/{path}", data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("headers", [{}, {HTTP_HEADER: "wrong"}, {GRPC_HEADER: KEY}], ids=str)
@pytest.mark.parametrize("action", ADMIN)
def test_http_is_refused_without_the_key(action: str, headers: dict[str, str], guarded: Any) -> None:
    assert http(guarded, *ADMIN[action][1], headers) == 403


@pytest.mark.parametrize("action", sorted(set(ADMIN) - NEVER))
def test_http_with_the_key(action: str, guarded: Any) -> None:
    assert http(guarded, *ADMIN[action][1], {HTTP_HEADER: KEY}) == 200


def test_inference_and_health_need_no_key(guarded: Any) -> None:
    with Client(guarded.grpc, timeout_s=60) as client:
        assert client.sample(CONTEXT, num_latents=4, steps=2).shape == (1, 4, 64)
        assert client.denoise(np.ones((1, 4, 64), np.float32), 0.5, CONTEXT).shape == (1, 4, 64)
        health = client.health()
        assert health.ready and not health.version and all(model.restricted for model in health.models)


def test_the_key_opens_what_the_client_reads(guarded: Any) -> None:
    with Client(transport=GrpcTransport(guarded.grpc, headers={GRPC_HEADER: KEY}), timeout_s=60) as client:
        health = client.health()
        assert health.version and not any(model.restricted for model in health.models)
        assert client.model_info("hunyuan3d_dit").file


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def files(authority: trustme.CA, folder: Path) -> dict[str, str]:
    """A server's certificate for 127.0.0.1, its key and the CA's certificate, as the entrypoint takes them."""
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    paths = {name: folder / f"{name}.pem" for name in ("TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE")}
    paths["TLS_CERT_FILE"].write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    paths["TLS_KEY_FILE"].write_bytes(certificate.private_key_pem.bytes())
    paths["TLS_CLIENT_CA_FILE"].write_bytes(authority.cert_pem.bytes())
    return {name: str(path) for name, path in paths.items()}


def sample(container: Any, credentials: grpc.ChannelCredentials | None) -> tuple[int, ...]:
    with Client(transport=GrpcTransport(container.grpc, credentials=credentials), timeout_s=20, retries=0) as client:
        return client.sample(CONTEXT, num_latents=4, steps=2).shape


def test_tls(authority: trustme.CA, run: Callable[..., Any], tmp_path: Path) -> None:
    environment = files(authority, tmp_path)
    del environment["TLS_CLIENT_CA_FILE"]
    with run(**environment) as container:
        container.wait_ready()
        trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        assert sample(container, trusted) == (1, 4, 64)
        (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
        command = [sys.executable, "-m", "hunyuan3d_client", "--ca", tmp_path / "ca.pem", "health", "--url", container.grpc]
        assert subprocess.run(command, timeout=60).returncode == 0
        for credentials in (None, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())):
            with pytest.raises(ServerUnavailable):
                sample(container, credentials)


def test_mutual_tls(authority: trustme.CA, run: Callable[..., Any], tmp_path: Path) -> None:
    def credentials(of: trustme.CA | None) -> grpc.ChannelCredentials:
        if of is None:
            return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        mine = of.issue_cert("client@example.org")
        chain = b"".join(blob.bytes() for blob in mine.cert_chain_pems)
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), mine.private_key_pem.bytes(), chain)

    with run(**files(authority, tmp_path)) as container:
        container.wait_ready()
        assert sample(container, credentials(authority)) == (1, 4, 64)
        for stranger in (None, trustme.CA()):
            with pytest.raises(ServerUnavailable):
                sample(container, credentials(stranger))
