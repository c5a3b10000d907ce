"""What export, deploy, serve and info say about weights, and what they refuse before any work."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import repository_from_artifacts
from hunyuan3d_export.commands import app, deployment
from hunyuan3d_export.commands import artifacts as commands
from hunyuan3d_export.commands.ready import summary
from hunyuan3d_export.dit.weights import SHIPPED, Weights
from hunyuan3d_export.identity import AnotherDeployed, check_deployed, deployed, described, weights_of
from hunyuan3d_export.pipeline import Named, find_pipeline
from hunyuan3d_export.repository_from_artifacts import SOURCE, DeployError, check_takes, deploy
from hunyuan3d_export.server.embedded import Endpoints
from hunyuan3d_export.shapevae.weights import ShapeVAESource

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call(*arguments): the command line in this process: its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hunyuan3d-export", *map(str, arguments)])
        try:
            code = app.run()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def repository(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro weights, deployed."""
    folder = tmp_path_factory.mktemp("deployed") / "repository"
    deploy(artifacts(), folder)
    return folder


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The repositories that would have been served."""
    served: list[Path] = []
    monkeypatch.setattr(deployment, "_run", lambda server: served.append(server.repository))
    return served


def test_deployed_weights_are_told_by_preset_precision_and_digest(repository: Path, micro: Any) -> None:
    digest = micro.identity()["checkpoint_sha256"]
    found = deployed(repository)
    assert weights_of(found[contract.DIT]).sha256 == digest
    assert described(found.values()) == [f"denoiser: custom fp32, weights {digest[:12]}"]


def test_serve_fails_on_other_weights_than_those_that_were_named(
    repository: Path, micro: Any, micro_weights: Callable[..., Any], call: Call, no_server: list[Path]
) -> None:
    """`make serve` names what PRESET and CHECKPOINT name."""
    own, other = micro.checkpoint, micro_weights(seed=1).checkpoint
    serve = ("serve", "--repository", repository, "--deployed")
    for right in ((), (own,), ("--precision", "fp32"), (own, "--precision", "fp32")):
        assert call(*serve, *right)[0] == 0
    assert no_server == [repository] * 4
    for wrong in (("--preset", "shapes"), (other,), ("--precision", "fp16"), (own, "--precision", "fp16")):
        code, _, text = call(*serve, *wrong)
        assert code == 2 and f"the denoiser in {repository} must be " in text and "found custom fp32, weights " in text
        assert "\nhint: deploy these weights first" in text
    assert len(no_server) == 4


def test_weights_of_a_network_that_is_not_deployed_are_others(repository: Path) -> None:
    with pytest.raises(AnotherDeployed, match="the shape decoder in .* must be weights abababababab, found none"):
        check_deployed(repository, {"shape decoder": "ab" * 32})
    with pytest.raises(AnotherDeployed, match="the denoiser in .* must be shapes, found none"):
        check_deployed(repository / "nothing", {}, preset="shapes")


def test_random_weights_are_told_in_capitals(
    artifacts: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where they are made and where they are deployed; trained ones are not."""
    with caplog.at_level(logging.WARNING, "hunyuan3d_export"):
        made = artifacts(Weights(preset="tiny"))
        assert "denoiser: RANDOM WEIGHTS from seed 0" in caplog.text
        caplog.clear()
        deploy(made, tmp_path / "random")
        assert "denoiser: tiny fp32, RANDOM WEIGHTS from seed 0: its results are noise" in caplog.text
        caplog.clear()
        deploy(artifacts(), tmp_path / "trained")
        assert "RANDOM" not in caplog.text


def test_serving_random_weights_is_told_in_capitals(
    artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deploy(artifacts(Weights(preset="tiny")), tmp_path)
    caplog.clear()
    monkeypatch.setattr(deployment.EmbeddedServer, "start", lambda _: (_ for _ in ()).throw(ValueError("no server here")))
    with caplog.at_level(logging.INFO, "hunyuan3d_export"), pytest.raises(ValueError, match="no server here"):
        deployment.serve(repository=tmp_path)
    assert "denoiser: tiny fp32, RANDOM WEIGHTS from seed 0: its results are noise" in caplog.text
    told = summary(tmp_path, "cpu", Endpoints(grpc="127.0.0.1:1", http="127.0.0.1:2", metrics="127.0.0.1:3", pid=1))
    assert told[1].endswith(", runtime cpu: denoiser: tiny fp32, RANDOM WEIGHTS from seed 0")


def test_export_says_what_it_found(
    micro: Any, call: Call, artifacts: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hunyuan3d_export"):
        call("onnx", "--checkpoint", micro.checkpoint, "--out", artifacts())
    assert f"{micro.checkpoint} (4.6 MB) holds:\n" in caplog.text
    assert "denoiser: custom (base), 1,136,960 parameters, width 128, 1 double and 1 single blocks" in caplog.text


def test_info_of_a_folder_has_a_line_for_each_artifact(repository: Path, artifacts: Callable[..., Path], call: Call) -> None:
    for folder in (artifacts(), repository):
        code, out, _ = call("info", folder)
        first, second, more = out.splitlines()
        assert code == 0 and first.startswith("hunyuan3d_dit: custom fp32, weights ") and "model.onnx.data, " in first
        assert second.startswith("hunyuan3d_dit_guided: ") and more.startswith(
            f"a whole manifest: hunyuan3d-export info {folder}"
        )
    assert '"made_from"' in call("info", artifacts() / contract.DIT)[1]
    assert call("info", repository / "nothing")[0] == 2


@pytest.mark.parametrize("preset", ["v2-0", "v2-mini", "tiny", "v2-0-turbo"])
def test_a_preset_of_another_size_is_refused(preset: str, micro: Any, tmp_path: Path, call: Call) -> None:
    code, _, text = call("onnx", "--checkpoint", micro.checkpoint, "--preset", preset, "--out", tmp_path / "out")
    assert code == 2 and f"preset must fit the weights, got {preset} for {micro.checkpoint}, which has a size" in text
    assert "hint: leave --preset out (for make: PRESET)" in text and not list(tmp_path.iterdir())


def test_a_preset_of_another_published_size_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="got tiny for .*which has the size of shapes"):
        find_pipeline(Named(checkpoint=SHIPPED["shapes"], preset="tiny"))
    assert find_pipeline(Named(checkpoint=SHIPPED["shapes"], preset="shapes")).sources["dit"].serving().name == "shapes"


def test_distilled_weights_of_no_published_size_need_the_name_of_their_kind(micro_distilled: Any) -> None:
    found = find_pipeline(Named(checkpoint=micro_distilled.checkpoint, preset="v2-0-turbo"))
    assert found.sources["dit"].serving().schedule == "consistency"


def test_files_that_share_a_name_have_folders_of_their_own(micro: Any, tmp_path: Path) -> None:
    names = set()
    for name in ("a/model.fp16.safetensors", "b/model.fp16.safetensors", "a/model.fp16.ckpt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(micro.checkpoint, path)  # the content decides, not the name
        names.add(find_pipeline(Named(checkpoint=path)).name)
    assert names == {"a-model.fp16", "b-model.fp16", "a-model.fp16.ckpt"}


def test_the_repository_in_git_refuses_weights_before_their_export(
    micro_distilled: Any, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_git = tmp_path / "model_repository"
    shutil.copytree(SOURCE, in_git, ignore=shutil.ignore_patterns("model.*on*", "*.json", "__pycache__"))
    monkeypatch.setattr(repository_from_artifacts, "SOURCE", in_git)
    exports: list[object] = []
    monkeypatch.setattr(commands, "export_onnx", lambda *_, **__: exports.append(1) or [])
    distilled = ("--checkpoint", micro_distilled.checkpoint, "--preset", "v2-0-turbo")
    engine = ("engine", "--onnx", tmp_path / "onnx", "--target", "tensorrt-rtx")
    for weights in (distilled, ("--preset", "shapes")):
        for command in (("onnx",), engine):
            code, _, text = call(*command, *weights, "--out", tmp_path / "out", "--repository", in_git)
            assert code == 2 and "the repository in git must keep its configs" in text and not exports
            assert "hint: deploy into a copy: --repository build/repository, or for make: REPOSITORY=build/repository" in text
    assert call("onnx", "--preset", "tiny", "--out", tmp_path / "out", "--repository", in_git)[0] == 0
    assert call("onnx", *distilled, "--out", tmp_path / "out", "--repository", tmp_path / "copy")[0] == 0
    assert len(exports) == 2
    with pytest.raises(DeployError, match="the shape decoder of tiny needs others"):
        check_takes([ShapeVAESource(preset="tiny")], in_git, precision="fp16")
    with pytest.raises(DeployError, match="must keep its configs"):  # base size, but in single precision
        check_takes([ShapeVAESource(preset="v2-0")], in_git, precision="fp32")
    check_takes([ShapeVAESource(preset="v2-0")], in_git, precision="fp16")
