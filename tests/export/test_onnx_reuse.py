"""An artifact is kept while its weights, options and code are unchanged, and is replaced whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from hunyuan3d_client import contract
from hunyuan3d_export import onnx_from_torch
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.files import ONNX_FILE
from hunyuan3d_export.manifest import NAME as MANIFEST
from hunyuan3d_export.manifest import Manifest
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx


class Traced(Exception):
    """Raised where an export begins to trace a graph."""


@pytest.fixture
def out(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the fp32 artifacts to change."""
    return Path(shutil.copytree(artifacts(), tmp_path / "out"))


@pytest.fixture
def stop_at_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export that begins to trace a graph raises Traced instead."""

    def begin(graph: onnx_from_torch.Graph, _module: object) -> None:
        raise Traced(graph.spec.name)

    monkeypatch.setattr(onnx_from_torch, "_trace", begin)


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.usefixtures("stop_at_trace")
def test_unchanged_is_kept(out: Path, micro: Weights) -> None:
    before = state_of(out)
    assert export_onnx(micro, out) == [out / contract.DIT, out / contract.DIT_GUIDED]
    assert state_of(out) == before


@pytest.mark.usefixtures("stop_at_trace")
def test_each_graph_alone_is_reused_too(out: Path, micro: Weights) -> None:
    assert export_onnx(micro, out, graph="guided") == [out / contract.DIT_GUIDED]
    shutil.rmtree(out / contract.DIT)
    with pytest.raises(Traced, match=f"^{contract.DIT}$"):
        export_onnx(micro, out)


@pytest.mark.usefixtures("stop_at_trace")
@pytest.mark.parametrize("change", ["seed", "preset", "precision", "attention", "code", "opset", "version"])
def test_anything_else_it_is_made_from_makes_it_stale(
    change: str, out: Path, micro: Weights, micro_weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, options = micro, OnnxOptions()
    if change == "seed":
        weights = micro_weights(seed=1)
    elif change == "preset":
        weights = dataclasses.replace(micro, preset="v2-mini")  # the artifact would hold other sampling defaults
    elif change == "code":
        monkeypatch.setattr(onnx_from_torch, "code_digest", lambda _paths: "another")
    elif change == "opset":
        monkeypatch.setattr(onnx_from_torch, "OPSET", 24)
    elif change == "version":
        monkeypatch.setattr(onnx_from_torch, "versions_of", lambda *names: dict.fromkeys(names, "99"))
    else:
        options = dataclasses.replace(options, **{change: {"precision": "fp16", "attention": "decomposed"}[change]})
    before = state_of(out)
    with pytest.raises(Traced):
        export_onnx(weights, out, options=options)
    assert state_of(out) == before, "an export that fails keeps the older artifact"


@pytest.mark.usefixtures("stop_at_trace")
@pytest.mark.parametrize("options", [OnnxOptions(choices={"guided_form": "repeat"}), OnnxOptions(for_plans=True)], ids=str)
def test_another_form_makes_the_guided_graph_alone_stale(options: OnnxOptions, out: Path, micro: Weights) -> None:
    assert Manifest.read(out / contract.DIT_GUIDED, hint="").made_from["options"]["guided_form"] == "bias"
    assert "guided_form" not in Manifest.read(out / contract.DIT, hint="").made_from["options"]
    assert export_onnx(micro, out, graph="plain") == [out / contract.DIT]
    with pytest.raises(Traced, match=f"^{contract.DIT_GUIDED}$"):
        export_onnx(micro, out, options=options)


@pytest.mark.usefixtures("stop_at_trace")
@pytest.mark.parametrize("option", ["residual", "attention_accumulation"])
def test_float32_parts_make_every_graph_stale(
    option: str, artifacts: Callable[..., Path], micro: Weights, tmp_path: Path
) -> None:
    half = Path(shutil.copytree(artifacts(precision="fp16"), tmp_path / "half"))
    for graph, model in (("plain", contract.DIT), ("guided", contract.DIT_GUIDED)):
        with pytest.raises(Traced, match=f"^{model}$"):
            export_onnx(micro, half, graph=graph, options=OnnxOptions(precision="fp16", choices={option: "fp32"}))


def test_the_code_of_the_network_is_what_the_graph_came_from(
    micro: Weights, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(onnx_from_torch, "code_digest", lambda paths: str(read.extend(paths)))
    monkeypatch.setattr(onnx_from_torch, "reusable", lambda *_: True)
    export_onnx(micro, out)
    names = {path.name for path in read}
    assert {"onnx_from_torch.py", "graphs.py", "model.py", "layers.py", "function.py"} <= names
    assert "contract.py" not in names, "a new row of the contract must not make every graph stale"


@pytest.mark.usefixtures("stop_at_trace")
def test_a_new_row_of_the_contract_keeps_the_graphs(out: Path, micro: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract.MODELS, "another", dataclasses.replace(contract.MODELS[contract.DIT], name="another"))
    before = state_of(out)
    export_onnx(micro, out)
    assert state_of(out) == before


@pytest.mark.usefixtures("stop_at_trace")
@pytest.mark.parametrize("change", ["range", "tensor"])
def test_a_graph_of_another_spec_is_stale(change: str, out: Path, micro: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "range":
        monkeypatch.setitem(contract.AXES, "L", contract.AxisRange(1, 3072, 8192))
    else:
        monkeypatch.setattr(contract, "CONTEXT", dataclasses.replace(contract.CONTEXT, dtype="FP32"))
    with pytest.raises(Traced):
        export_onnx(micro, out)


def _truncate(folder: Path) -> None:
    path = folder / f"{ONNX_FILE}.data"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    path = folder / f"{ONNX_FILE}.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _lose(folder: Path) -> None:
    (folder / ONNX_FILE).unlink()


def _unmanifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _garble(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00 not even text")


@pytest.mark.usefixtures("stop_at_trace")
@pytest.mark.parametrize("damage", [_truncate, _flip, _lose, _unmanifest, _garble])
def test_damage_makes_it_stale(damage: Callable[[Path], None], out: Path, micro: Weights) -> None:
    damage(out / contract.DIT_GUIDED)
    with pytest.raises(Traced, match=f"^{contract.DIT_GUIDED}$"):
        export_onnx(micro, out)


def test_a_stale_artifact_is_replaced_by_an_equal_one(out: Path, micro: Weights) -> None:
    before = Manifest.read(out / contract.DIT, hint="")
    _flip(out / contract.DIT)
    export_onnx(micro, out, graph="plain")
    after = Manifest.read(out / contract.DIT, hint="")
    after.check_files(out / contract.DIT, hint="")
    assert json.loads(json.dumps(after.files)) == before.files, "the same weights, options and code give the same bytes"
    assert after.made_from == before.made_from


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_after_writing_the_weights(
    existing: bool, out: Path, micro: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = out / contract.DIT
    _unmanifest(folder) if existing else shutil.rmtree(folder)
    before = state_of(out)
    written: list[int] = []

    def interrupt(path: str) -> None:
        written.append(Path(path).with_name(f"{ONNX_FILE}.data").stat().st_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(micro, out, graph="plain")
    assert written[0] > 1_000_000, "the interruption must have come late"
    assert state_of(out) == before
    assert folder.exists() == existing
