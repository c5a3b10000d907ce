"""The variables of the Makefile: which folder an export goes into, and what the commands get. A stub stands for the programs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    """make(*arguments) in a folder where hunyuan3d-export only prints its arguments, one call a line."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    program = tmp_path / ".venv" / "bin" / "hunyuan3d-export"
    program.parent.mkdir(parents=True)
    program.write_text("#!/usr/bin/env bash\nprintf '%q ' \"$@\"\necho\n")
    program.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin"}
        return subprocess.run(
            ["make", "-s", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment, check=False
        )

    return run


def calls(found: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert found.returncode == 0, found.stderr
    return [shlex.split(line) for line in found.stdout.splitlines() if not line.startswith("make")]


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize(
    ("checkpoint", "out"),
    [
        ("w/hunyuan3d-dit-v2-0/model.fp16.safetensors", "build/hunyuan3d-dit-v2-0-model.fp16-fp32"),
        ("w/hunyuan3d-dit-v2-mini/model.fp16.safetensors", "build/hunyuan3d-dit-v2-mini-model.fp16-fp32"),
        ("w/hunyuan3d-dit-v2-0/model.fp16.ckpt", "build/hunyuan3d-dit-v2-0-model.fp16.ckpt-fp32"),
        ("my weights/model.ckpt", "build/my_weights-model.ckpt-fp32"),
        ("./model.safetensors", "build/model-fp32"),
        ("folder", "build/folder-fp32"),
    ],
    ids=["file", "another variant", "ckpt", "space", "here", "folder"],
)
def test_each_checkpoint_has_a_folder_of_its_own(checkpoint: str, out: str, make: Make) -> None:
    (export,) = calls(make("export-onnx", f"CHECKPOINT={checkpoint}"))
    assert after(export, "--checkpoint") == checkpoint and after(export, "--out") == out


@pytest.mark.parametrize("target", ["export-onnx", "verify", "deploy", "export-engine", "serve"])
def test_a_path_with_a_space_stays_one_argument(target: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "a repository" / "m" / "1").mkdir(parents=True)
    (tmp_path / "a repository" / "m" / "1" / "model.onnx").touch()
    found = calls(make(target, "CHECKPOINT=a b/c d.ckpt", "REPOSITORY=a repository", "OUT=an out"))
    assert any("a b/c d.ckpt" in arguments for arguments in found)
    if target in ("deploy", "export-engine", "serve"):
        assert all(after(arguments, "--repository") == "a repository" for arguments in found)
    if target != "serve":
        assert all("an out" in " ".join(arguments) for arguments in found)


def test_further_weights_and_networks_reach_every_command(make: Make) -> None:
    variables = ("CHECKPOINT=o/n", "SUBFOLDER=dit v2", "VAE=v ae", "NETWORK=dit vae")
    for arguments in (calls(make(target, *variables))[0] for target in ("export-onnx", "verify", "deploy", "export-engine")):
        assert (after(arguments, "--subfolder"), after(arguments, "--vae")) == ("dit v2", "v ae")
        assert [arguments[i + 1] for i, name in enumerate(arguments) if name == "--network"] == ["dit", "vae"]
    *_, verify = calls(make("verify", *variables))
    assert verify[0] == "verify" and (after(verify, "--subfolder"), after(verify, "--vae")) == ("dit v2", "v ae")
    _, deploy = calls(make("deploy", *variables))
    assert [deploy[i + 1] for i, name in enumerate(deploy) if name == "--network"] == ["dit", "vae"]
    assert {"SUBFOLDER=", "VAE=", "NETWORK="} <= set(make("help").stdout.replace("NETWORK=dit", "NETWORK= dit").split())


@pytest.mark.parametrize("variable", ["CHECKPOINT", "PRESET"])
def test_an_empty_name_of_weights_is_an_error(variable: str, make: Make) -> None:
    """A script whose variable is empty must not replace a deployment by random weights."""
    for target in ("deploy", "serve", "export-onnx"):
        found = make(target, f"{variable}=")
        assert found.returncode == 2 and f"{variable} must name weights, got nothing" in found.stderr and not found.stdout


def test_a_repository_is_asked_before_the_export(make: Make) -> None:
    for target, variables in (("deploy", ()), ("export-engine", ("TARGET=tensorrt",))):
        first, second = calls(make(target, "REPOSITORY=r", *variables))
        assert after(first, "--repository") == after(second, "--repository") == "r" and second[0] == "deploy"
    (only,) = calls(make("export-engine", "TARGET=tensorrt-rtx"))
    assert "--repository" not in only


def test_serve_passes_on_only_what_was_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "model_repository" / "m" / "1").mkdir(parents=True)
    (tmp_path / "model_repository" / "m" / "1" / "model.onnx").touch()
    (plain,) = calls(make("serve"))
    assert plain == ["serve", "--repository", "model_repository", "--deployed"]
    (named,) = calls(make("serve", "PRESET=shapes", "PRECISION=fp16"))
    assert named[4:] == ["--preset", "shapes", "--precision", "fp16"]
    (file,) = calls(make("serve", "CHECKPOINT=x.ckpt"))
    assert file[4:] == ["x.ckpt"]
