"""One rule says which plans the server's image can load: in `deploy`, in `serve` and, as a file by itself, in the container."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hunyuan3d_export.engines import server_image

SOURCE = Path(server_image.__file__)
# The plan's version, whether it is version-compatible, the image's version, and whether the image can load the plan.
CASES = [
    ("11.1.0.106", False, "11.1.0", True),
    ("11.1.0.106", False, "11.1.0.106", True),
    ("11.1.0", False, "11.1.0", True),
    ("11.1.0.106", False, "11.1.0.107", False),
    ("11.3.0.99", False, "11.1.0", False),
    ("11.10.0.1", False, "11.1", False),
    ("11.1.0.106", True, "11.3.0", True),
    ("11.3.0.99", True, "11.1.0", False),
    ("10.16.1.11", True, "11.1.0", False),
]


def placed(folder: Path, library_version: str, *, version_compatible: bool) -> Path:
    """A repository with one plan."""
    version = folder / "hunyuan3d_dit" / "1"
    version.mkdir(parents=True)
    (version / "model.plan").write_bytes(b"")
    made_from = {"library_version": library_version, "version_compatible": version_compatible}
    (version / "manifest.json").write_text(json.dumps({"made_from": made_from}))
    return folder


def in_container(folder: Path, image: str | None) -> subprocess.CompletedProcess[str]:
    """The file by itself, with no package around it and no variable but the image's."""
    variables = {"PATH": os.environ["PATH"], **({"TENSORRT_VERSION": image} if image else {})}
    alone = folder.parent / "opt" / "hunyuan3d" / "server_image.py"
    alone.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SOURCE, alone)
    command = [sys.executable, "-I", str(alone), str(folder)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("plan", "compatible", "image", "loads"), CASES)
def test_the_rule(plan: str, compatible: bool, image: str, loads: bool, tmp_path: Path) -> None:
    made_from = {"library_version": plan, "version_compatible": compatible}
    problem = server_image.refusal(made_from, image)
    assert (problem is None) == loads
    done = in_container(placed(tmp_path / "models", plan, version_compatible=compatible), image)
    assert done.returncode == (0 if loads else 2), done.stderr
    assert done.stdout == ("--backend-config=tensorrt,version-compatible=true\n" if compatible and loads else "")
    if problem:
        assert f"error: hunyuan3d_dit {problem}\nhint: docker compose --profile export" in done.stderr
        assert image in problem and plan in problem


def test_an_image_of_unknown_version_takes_every_plan(tmp_path: Path) -> None:
    assert in_container(placed(tmp_path / "models", "1.0", version_compatible=False), None).returncode == 0


@pytest.mark.parametrize("manifest", [None, "{half", "{}", "[]"])
def test_a_plan_without_a_manifest_is_refused(manifest: str | None, tmp_path: Path) -> None:
    models = placed(tmp_path / "models", "11.1.0", version_compatible=False)
    path = models / "hunyuan3d_dit" / "1" / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    done = in_container(models, "11.1.0")
    assert done.returncode == 2 and "hunyuan3d_dit must have a manifest of the plan beside it" in done.stderr


def test_links_to_models_are_followed(tmp_path: Path) -> None:
    """The entrypoint gives it a folder of links to the models that will be loaded."""
    placed(tmp_path / "models", "1.0", version_compatible=False)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "hunyuan3d_dit").symlink_to(tmp_path / "models" / "hunyuan3d_dit")
    assert in_container(tmp_path / "links", "11.1.0").returncode == 2


def test_the_version_comes_from_versions_env(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_VERSION", raising=False)
    assert f"TENSORRT_VERSION={server_image.tensorrt_version()}\n" in (root / "docker" / "versions.env").read_text()
    monkeypatch.setenv("TENSORRT_VERSION", "12.0.0")
    assert server_image.tensorrt_version() == "12.0.0"


def test_an_installed_package_reads_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_VERSION", raising=False)
    package = tmp_path / "lib" / "site-packages" / "hunyuan3d_export"
    (package / "engines").mkdir(parents=True)
    assert loaded(Path(shutil.copy(SOURCE, package / "engines"))).tensorrt_version() is None
    (package / "versions.env").write_text("# a comment\nTRITON_TAG=x\nTENSORRT_VERSION=9.8.7\n")
    assert loaded(package / "engines" / SOURCE.name).tensorrt_version() == "9.8.7"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("alone", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
