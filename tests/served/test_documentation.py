"""The Python blocks of the documents, run as a user would against a real server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hunyuan3d_client import Client
from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints

pytestmark = pytest.mark.served


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "docs/client.md"])
def test_python_blocks_run(
    document: str,
    served: Endpoints,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # the blocks write files
    blocks = python_blocks(root / document)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("localhost:8001", served.grpc), document, "exec"), namespace)
    assert namespace["latents"].shape[0] == namespace["velocity"].shape[0] == 1
    assert capsys.readouterr().out


@pytest.mark.slow
def test_python_blocks_about_pictures_run(
    artifacts: Callable[..., Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("picture.png", "front.png", "left.png"):
        Image.new("RGB", (64, 48), "orange").save(name)
    encoder = root / "build" / "test" / "conditioner-fp32-op-4"
    export_onnx(ConditionerSource(views=4), encoder)
    deploy(artifacts(), tmp_path / "repository")
    deploy(encoder, tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository") as endpoints, Client(endpoints.grpc) as client:
        namespace: dict[str, Any] = {"client": client}
        for block in python_blocks(root / "docs" / "images.md"):
            exec(compile(block, "docs/images.md", "exec"), namespace)
    assert namespace["context"].shape == (1, 1370, 1536) and namespace["latents"].shape[0] == 1
    assert capsys.readouterr().out.split()[-2:] == ["50", "50"]
