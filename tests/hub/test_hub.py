"""Checkpoints on the hub: downloaded through huggingface_hub with its cache, its token, its offline mode and its endpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, running

from hunyuan3d_export.checkpoint_files import is_hub_id

SCRIPT = """
import sys
from pathlib import Path
from hunyuan3d_export.checkpoint_files import find_files
try:
    found = find_files(Path(sys.argv[1]), *sys.argv[2:])
except (ValueError, OSError) as error:
    sys.exit(str(error))
print(found.name, found.weights.name, found.weights.read_text(), found.config and found.config.read_text())
"""
ID, SUBFOLDER = "tencent/Hunyuan3D-2", "hunyuan3d-dit-v2-0"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repositories" / ID / SUBFOLDER
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("settings")
    for name in ("model.ckpt", "model.safetensors", "model.fp16.safetensors"):
        (folder / name).write_text(f"weights-of-{name}")
    (folder.parent / "only-ckpt").mkdir()
    (folder.parent / "only-ckpt" / "model.ckpt").write_text("pickled")
    (folder.parent.parent / "private" / "sub").mkdir(parents=True)
    (folder.parent.parent / "private" / "sub" / "model.safetensors").write_text("secret")
    with running(tmp_path / "repositories", private="tencent/private") as hub:
        yield hub


def find(hub: Hub, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """find_files in a process of its own, because huggingface_hub reads its environment when it is imported."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**kept, "NO_PROXY": "127.0.0.1", **own, **environment},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_one_weights_file_and_its_config_are_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    expected = f"{SUBFOLDER} model.fp16.safetensors weights-of-model.fp16.safetensors settings\n"
    found = find(hub, tmp_path, ID, SUBFOLDER, TQDM_POSITION="-1")  # as on a terminal
    assert found.stdout == expected, found.stderr
    assert "model.fp16.safetensors: 100%" in found.stderr, "a progress bar"
    names = [request.rpartition("/")[2] for request in hub.requests if request.startswith("GET")]
    assert names == ["config.yaml", "model.fp16.safetensors"], "no other weights"
    hub.requests.clear()
    assert find(hub, tmp_path, ID, SUBFOLDER).stdout == expected
    assert hub.requests and not [request for request in hub.requests if request.startswith("GET")], "from the cache"
    hub.requests.clear()
    assert find(hub, tmp_path, ID, SUBFOLDER, HF_HUB_OFFLINE="1").stdout == expected
    assert hub.requests == []
    assert find(hub, tmp_path, ID, "only-ckpt").stdout == "only-ckpt model.ckpt pickled None\n"


def test_what_the_hub_lacks_or_refuses_is_said(hub: Hub, tmp_path: Path) -> None:
    for arguments, environment, message in (
        ((ID,), {}, "must hold one of model.fp16.safetensors, .*\nhint: --subfolder names the folder"),
        ((ID, "none"), {}, "found none in none on the hub or in the cache"),
        ((ID, SUBFOLDER), {"HF_HUB_OFFLINE": "1"}, "found none in .*without a connection only cached files"),
        (("tencent/none", "sub"), {}, "the hub must give tencent/none, got: .*\nhint: `hf auth login` or HF_TOKEN"),
        (("tencent/private", "sub"), {}, "the hub must give tencent/private, got"),
    ):
        found = find(hub, tmp_path, *arguments, **environment)
        assert found.returncode == 1 and found.stdout == "" and "Traceback" not in found.stderr, found.stderr

        assert re.search(message, found.stderr, re.DOTALL), found.stderr
    found = find(hub, tmp_path, "tencent/private", "sub", HF_TOKEN="hf_secret")
    assert found.stdout == "sub model.safetensors secret None\n", found.stderr
    assert hub.tokens[-1] == "Bearer hf_secret"


def test_ids_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(Path(ID))
    (tmp_path / ID).mkdir(parents=True)
    assert not is_hub_id(Path(ID)), "a folder on this machine comes first"
    for path in (
        "weights",
        "a/b/c",
        "build/model.safetensors",
        "build/model.ckpt",
        str(tmp_path / "none"),
        "../none",
        "./none",
    ):
        assert not is_hub_id(Path(path)), path
