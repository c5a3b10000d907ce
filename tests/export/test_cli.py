"""`hunyuan3d-export`: exit codes, one message and a hint instead of a traceback, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from hunyuan3d_client import contract
from hunyuan3d_export.commands import app, deployment, plans
from hunyuan3d_export.commands import artifacts as graphs
from hunyuan3d_export.dit import network
from hunyuan3d_export.engines.gpu import first_gpu
from hunyuan3d_export.files import sha256
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.parity import RECEIPT


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """call(*arguments): the command line in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hunyuan3d-export", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            code = app.run()
        except SystemExit as exit_:
            code = exit_.code
        found = Result(int(code or 0), *capsys.readouterr())
        assert "Traceback" not in found.err
        return found

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A file with a VAE and no DiT."""
    path = tmp_path / "vae.safetensors"
    save_file({"vae.decoder.weight": torch.zeros(3)}, path)
    return path


def test_bad_weights(call: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for weights, message in (
        (["--checkpoint", tmp_path / "none.ckpt"], "found nothing at"),
        (["--checkpoint", tmp_path / "empty"], "found a folder at"),
        (["--checkpoint", checkpoint], "must hold a DiT"),
        (["--checkpoint", broken], "must be a whole .safetensors or .ckpt file"),
        (["--preset", "v3"], "preset must be one of tiny, "),
        ([], "weights must come from a preset or a checkpoint, got neither\nhint: pass --preset or --checkpoint"),
        (["--preset", "tiny", "--precision", "fp8"], "precision must be one of fp32, fp16, bf16, got 'fp8'"),
        (["--preset", "tiny", "--graph", "both"], "graph must be one of plain, guided, all, got 'both'"),
        (["--preset", "tiny", "--attention", "flash"], "attention must be one of op, decomposed, got 'flash'"),
        (["--preset", "v2-0-turbo", "--graph", "guided"], "graph must be plain for guidance-distilled weights"),
        (["--preset", "tiny", "--guided-form", "mask"], "guided_form must be one of bias, repeat, got 'mask'"),
        (["--preset", "tiny", "--residual", "fp32"], "residual must be native in an fp32 graph, got fp32"),
        (["--preset", "tiny", "--attention-accumulation", "fp16"], "attention_accumulation must be one of native, fp32"),
    ):
        found = call("onnx", "--out", out, *weights)
        assert found.code == 2 and message in found.err and found.err.startswith("error: "), found
        assert found.out == "" and not out.exists()


def test_distilled_weights_need_a_name_and_the_right_one(
    call: Callable[..., Result], micro: Any, micro_distilled: Any, tmp_path: Path
) -> None:
    found = call("onnx", "--out", tmp_path / "out", "--checkpoint", micro_distilled.checkpoint)
    assert found.code == 2 and "preset must be named for guidance-distilled weights" in found.err
    assert "v2-0-turbo" in found.err and "v2-0-fast" in found.err
    for weights, preset in ((micro, "v2-0-turbo"), (micro_distilled, "v2-0")):
        found = call("onnx", "--out", tmp_path / "out", "--checkpoint", weights.checkpoint, "--preset", preset)
        assert found.code == 2 and f"preset must fit the weights, got {preset} for " in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["onnx"], ["onnx", "--outt", "x"], ["train"]], ids=" ".join)
def test_misuse(arguments: list[str], call: Callable[..., Result]) -> None:
    found = call(*arguments)
    assert found.code == 2 and "Usage" in found.err


@pytest.mark.parametrize("command", ["", "onnx", "verify", "deploy", "serve", "info"])
def test_help_explains(command: str, call: Callable[..., Result]) -> None:
    found = call(*filter(None, [command]), "--help")
    assert found.code == 0 and "Usage" in found.out and len(found.out.splitlines()) > 8


def test_onnx_prints_its_folders(call: Callable[..., Result], artifacts: Callable[..., Path], micro: Any) -> None:
    out = artifacts()
    found = call("onnx", "--out", out, "--checkpoint", micro.checkpoint)
    assert found.code == 0 and found.out.split() == [str(out / contract.DIT), str(out / contract.DIT_GUIDED)]


def test_forms_and_float32_parts_reach_the_graphs(
    call: Callable[..., Result], micro: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exports = []

    def record(_weights: object, _out: Path, **options: Any) -> list[Path]:
        exports.append(options["options"])
        return []

    for module in (graphs, plans):
        monkeypatch.setattr(module, "export_onnx", record)
    monkeypatch.setattr(plans, "build_engines", lambda *_, **__: [])
    monkeypatch.setattr(plans, "refit_plans", lambda *_: [])
    flags = ["--guided-form", "bias", "--attention-accumulation", "fp32", "--residual", "fp32"]
    chosen = {"guided_form": "bias", "attention_accumulation": "fp32", "residual": "fp32"}
    weights = ["--checkpoint", micro.checkpoint, "--precision", "fp16", "--out", tmp_path / "out"]
    engine = ["engine", "--onnx", tmp_path / "onnx", "--target", "tensorrt-rtx"]
    for arguments in (["onnx", *weights], ["onnx", *weights, *flags], [*engine, *weights], [*engine, *weights, *flags]):
        assert call(*arguments).code == 0
    assert [(options.for_plans, options.choices) for options in exports] == [
        (False, {}),
        (False, chosen),
        (True, {}),
        (True, chosen),
    ]
    alone = call(*engine, "--out", tmp_path / "out", *flags[:2])
    assert alone.code == 2 and "guided_form must come with weights to export, got none\nhint: --preset" in alone.err

    folder = tmp_path / "plans" / contract.DIT_GUIDED  # a refit exports what its plans were built from
    folder.mkdir(parents=True)
    (folder / "model.plan").write_bytes(b"plan")
    made_from = {"options": chosen}
    files = {"model.plan": sha256(folder / "model.plan")}
    Manifest(model=contract.DIT_GUIDED, made_from=made_from, serving={}, versions={}, files=files).write(folder)
    assert call("refit", "--plan", folder.parent, "--onnx", tmp_path / "onnx", *weights).code == 0
    assert (exports[-1].for_plans, exports[-1].choices) == (True, chosen)


def test_verify(
    call: Callable[..., Result], artifacts: Callable[..., Path], micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_MOST_STEPS", 4)
    out = Path(shutil.copytree(artifacts(), tmp_path / "out"))
    right = call("verify", "--artifacts", out, "--checkpoint", micro.checkpoint)
    assert right.code == 0 and right.out.count("ok") == 8 and "FAILED" not in right.out
    assert json.loads((out / contract.DIT / RECEIPT).read_text())["checks"]
    assert f"receipt: {out / contract.DIT / RECEIPT}\n" in right.out and right.err.count("verify: hunyuan3d_dit: ") == 4
    assert right.out.count(contract.DIT_GUIDED) == 2, "in its heading and its receipt, not in each row"
    assert max(len(line) for line in right.out.splitlines() if not line.startswith("receipt: ")) <= 80
    quick = call("verify", "--artifacts", out, "--checkpoint", micro.checkpoint, "--quick")
    assert quick.code == 0 and quick.out.count("ok") == 2 and "no receipt was written" in quick.out
    forged = tmp_path / "forged"
    shutil.copytree(artifacts(seed=1), forged)
    for model in (contract.DIT, contract.DIT_GUIDED):
        manifest = Manifest.read(forged / model, hint="")
        identity = Manifest.read(out / model, hint="").made_from
        Manifest(**{**vars(manifest), "made_from": identity}).write(forged / model)
    wrong = call("verify", "--artifacts", forged, "--checkpoint", micro.checkpoint)
    assert wrong.code == 1 and wrong.out.count("FAILED") == 8
    missing = call("verify", "--artifacts", tmp_path / "nothing")
    assert missing.code == 2 and "must hold artifact folders" in missing.err


def test_deploy(call: Callable[..., Result], artifacts: Callable[..., Path], tmp_path: Path) -> None:
    found = call("deploy", "--artifacts", artifacts(), "--repository", tmp_path / "repository")
    assert found.code == 0
    assert found.out.splitlines() == [
        f"{model} -> {tmp_path / 'repository' / model}" for model in (contract.DIT, contract.DIT_GUIDED)
    ]
    assert "deployed" not in found.err, "each model is listed once"
    refused = call("deploy", "--artifacts", artifacts(distilled=True))
    assert refused.code == 2 and "hint: deploy into a copy: --repository build/repository" in refused.err


def test_deploy_weights(call: Callable[..., Result], micro: Any, artifacts: Callable[..., Path], tmp_path: Path) -> None:
    where = ("--repository", tmp_path / "repository")
    nothing = call("deploy", *where)
    assert nothing.code == 2 and "deploy must get artifacts or weights, got neither\nhint: --artifacts DIR" in nothing.err
    found = call(
        "deploy", "--checkpoint", micro.checkpoint, "--precision", "fp16", "--torch", "attention_backend=chunked", *where
    )
    assert found.code == 0 and "hunyuan3d_dit_guided -> " in found.out
    config = (tmp_path / "repository" / "hunyuan3d_dit" / "configs" / "torch.pbtxt").read_text()
    assert 'string_value: "chunked"' in config
    for options in (("--checkpoint", micro.checkpoint), ("--torch", "dtype=fp16")):
        both = call("deploy", "--artifacts", artifacts(), *options, *where)
        assert both.code == 2 and "deploy must get artifacts or weights, got both" in both.err


def test_serve_refuses_before_it_starts(call: Callable[..., Result], artifacts: Callable[..., Path], tmp_path: Path) -> None:
    found = call("serve", "--repository", tmp_path / "nothing")
    assert found.code == 2 and "must be a model repository, found no config.pbtxt\nhint: " in found.err
    call("deploy", "--artifacts", artifacts(), "--repository", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = call("serve", "--repository", tmp_path, "--grpc-port", port, "--http-port", 0, "--metrics-port", 0)
    assert found.code == 1 and f"grpc port must be free, got {port}" in found.err and found.out == ""


def test_info(call: Callable[..., Result]) -> None:
    found = call("info", "--preset", "v2-0")
    assert found.code == 0 and "1,113,274,432 parameters, L 3072, T 1370" in found.out
    for cell in ("9.25", "18.5", "0.80", "0.85", "42%", "two-batch", "guided, bias", "guided, repeat"):
        assert cell in found.out
    assert "0.61" in call("info", "--preset", "v2-0", "--context", 5480).out
    assert "0.61" in call("info", "--preset", "v2-mini", "--latents", 512).out
    assert "two-batch" not in [
        line.split()[1] for line in call("info", "--preset", "v2-0-turbo").out.splitlines()[3:] if "│" in line
    ]
    unknown = call("info", "--preset", "v3")
    assert unknown.code == 2 and "v2-mini" in unknown.err
    assert call("info", "--preset", "v2-0", "--latents", 0).code == 2


@pytest.mark.slow
@pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU: plans are tried")
def test_verify_of_plans_without_a_gpu_is_skipped(call: Callable[..., Result], artifacts: Any, tmp_path: Path) -> None:
    onnx, plans = artifacts(precision="fp16"), tmp_path / "plans"
    found = call("engine", "--onnx", onnx, "--out", plans, "--target", "tensorrt-rtx", "--compute-capability", "SM89")
    assert found.code == 0
    found = call("verify", "--engine", plans)
    assert (found.code, found.out) == (0, f"{plans}: skipped: a plan runs on a GPU, and this machine has none\n")
    found = call("verify")
    assert found.code == 2 and "verify must get a folder, got none\nhint: --artifacts DIR" in found.err
    found = call("refit", "--plan", plans, "--onnx", onnx, "--out", tmp_path / "out")
    assert found.code == 2 and "must hold a weight-stripped plan, got none\nhint: hunyuan3d-export engine" in found.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (8001, 8000, 8002)),
        ((0, None, None), (0, 0, 0)),
        ((None, 0, 9002), (0, 0, 9002)),
        ((9001, None, None), (9001, 8000, 8002)),
    ],
    ids=str,
)
def test_a_free_port_for_one_means_free_ports_for_all_that_are_not_given(
    given: tuple[Any, ...], expected: tuple[int, ...]
) -> None:
    assert deployment.ports(*given) == expected
