"""The Python blocks of README.md and docs/client.md, run as a user would against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served


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
    blocks = re.findall(r"^```python\n(.*?)^```", (root / document).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("localhost:8001", served.grpc), document, "exec"), namespace)
    assert namespace["latents"].shape[0] == namespace["velocity"].shape[0] == 1
    assert capsys.readouterr().out
