"""Graphs without their weights, small enough to carry to a GPU machine that cannot export: there the seed makes the weights.

A packed graph is the ONNX graph in which each large initializer is replaced by a recipe: which rows or columns of which tensors of
the state dict it consists of. The exporter transposes weights and may cut or join them, so the recipes are found by comparing
numbers, and a graph is packed only when the recipes give exactly its weights. Random weights come from a seed, so nothing else
has to be carried.

    python -m hunyuan3d_export.gpu_check.graphs        packs the graphs of v2-0 and v2-mini, of the denoiser and of the shape decoder
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import torch

from .. import onnx_from_torch
from ..dit.weights import Weights
from ..files import ONNX_FILE, atomic_folder, atomic_path
from ..graphs import Source
from ..manifest import NAME as MANIFEST
from ..manifest import Manifest, code_digest, file_digests
from ..networks import NETWORKS
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..precisions import PRECISIONS
from ..shapevae.weights import ShapeVAESource
from .paths import GUIDED_FORMS
from .rows import Skip
from .setting import Setting

_SEED = 0
_RECIPES, _CODE = "recipes.json", "code"
_SMALLEST = 64  # elements; a smaller initializer stays in the graph
_LARGEST_KEPT = 65536  # elements; a larger initializer must have a recipe
_PROBE = 16  # the first elements of a row or column, by which it is looked up
_REMAKE = "make gpu-check-graphs on a machine with onnxscript"

Array = np.ndarray[Any, Any]
State = Mapping[str, Array]
# Each piece: the tensor's name, "rows" or "columns", and the first and the last but one of them.
Piece = tuple[str, str, int, int]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The graphs of one packed file: those of the denoiser (network dit) or of the shape decoder (network vae).

    form: of the guided graph. The plain graph is in the file of the first form alone, and the shape decoder has no forms.
    """

    preset: str
    precision: str
    form: str = GUIDED_FORMS[0]
    network: str = "dit"

    @property
    def name(self) -> str:
        """The packed file's name without its ending."""
        other = self.network if self.network != "dit" else self.form if self.form != GUIDED_FORMS[0] else ""
        return "-".join(filter(None, (self.preset, self.precision, other)))

    @property
    def source(self) -> Source:
        """The random weights."""
        source = {"dit": Weights, "vae": ShapeVAESource}[self.network]
        return source(preset=self.preset, seed=_SEED)

    @property
    def code(self) -> str:
        """The digest of the code that makes the graphs and packs them."""
        return code_digest([Path(__file__), Path(onnx_from_torch.__file__), *NETWORKS[self.network].code])

    def state(self) -> State:
        """The weights in this precision by name. The exporter may keep small ones in float32, so their float32 copies follow."""
        weights = self.source.load(PRECISIONS[self.precision]).state_dict()
        small = {
            name: value for name, value in weights.items() if value.dtype != torch.float32 and value.numel() <= _LARGEST_KEPT
        }
        copies = {f"{name} in float32": value.float() for name, value in small.items()}
        return {name: value.numpy() for name, value in {**weights, **copies}.items()}

    def export(self, folder: Path) -> list[Path]:
        """Exports the graphs. Returns their artifact folders."""
        if self.network != "dit":
            return export_onnx(self.source, folder, options=OnnxOptions(precision=self.precision))
        options = OnnxOptions(precision=self.precision, choices={"guided_form": self.form})
        return export_onnx(self.source, folder, graph="all" if self.form == GUIDED_FORMS[0] else "guided", options=options)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an initializer is made: its pieces below each other, and then transposed where `transposed` is set."""

    pieces: tuple[Piece, ...]
    transposed: bool

    def make(self, state: State) -> Array:
        """The initializer. A vector counts as one column, so its pieces are cut from its elements."""
        parts = [
            state[name][start:end] if kind == "rows" else state[name][:, start:end].T for name, kind, start, end in self.pieces
        ]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(joined.T if self.transposed else joined)


class Pantry:
    """Finds the recipes of initializers in one state dict."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._places: dict[bytes, tuple[str, str, int]] = {}
        for name, value in state.items():
            if value.ndim == 1:
                self._places[value[:_PROBE].tobytes()] = (name, "rows", 0)
                continue
            for kind, lines in (("rows", value), ("columns", value.T)):
                probes = np.ascontiguousarray(lines[:, :_PROBE])
                self._places.update({probe.tobytes(): (name, kind, index) for index, probe in enumerate(probes)})

    def recipe(self, wanted: Array) -> Recipe | None:
        """A recipe that gives exactly `wanted`; None when there is none."""
        for transposed in (False, True)[: wanted.ndim]:
            pieces = tuple(self._pieces(wanted.T if transposed else wanted))
            recipe = Recipe(pieces, transposed)
            if pieces and np.array_equal(recipe.make(self._state), wanted):
                return recipe
        return None

    def _pieces(self, lines: Array) -> Iterator[Piece]:
        """The runs of rows or columns that `lines` consists of; they end early at a line that no tensor has."""
        index = 0
        while index < len(lines):
            probe = lines[index : index + _PROBE] if lines.ndim == 1 else lines[index, :_PROBE]
            place = self._places.get(np.ascontiguousarray(probe).tobytes())
            if place is None:
                return
            name, kind, start = place
            tensor = self._state[name]
            count = len(tensor) if lines.ndim == 1 else self._run(lines, index, tensor if kind == "rows" else tensor.T, start)
            yield name, kind, start, start + count
            index += count

    def _run(self, lines: Array, index: int, tensor: Array, start: int) -> int:
        """How many lines from `index` on equal the tensor's from `start` on, by their first elements."""
        most = min(len(lines) - index, len(tensor) - start)
        same = (lines[index : index + most, :_PROBE] == tensor[start : start + most, :_PROBE]).all(axis=1)
        return most if same.all() else int(same.argmin())


def pack(contents: Contents, out: Path) -> Path:
    """Exports the graphs with random weights and writes them without these weights. Returns the file.

    Raises ValueError when a weight of the graph cannot be made from the state dict.
    """
    pantry = Pantry(contents.state())
    path = out / f"{contents.name}.zip"
    with tempfile.TemporaryDirectory() as folder, atomic_path(path) as temporary:
        exported = contents.export(Path(folder))
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as packed:
            packed.writestr(_CODE, contents.code)
            for artifact in exported:
                graph, recipes = _without_weights(artifact / ONNX_FILE, pantry)
                packed.writestr(f"{artifact.name}/{ONNX_FILE}", graph)
                texts = {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()}
                packed.writestr(f"{artifact.name}/{_RECIPES}", json.dumps(texts))
                packed.writestr(f"{artifact.name}/{MANIFEST}", (artifact / MANIFEST).read_bytes())
    logger.info("%s: %.0f kB", path, path.stat().st_size / 1e3)
    return path


def unpack(path: Path, contents: Contents, out: Path) -> Path:
    """Writes the artifact folders of a packed file into `out`, with the weights of the seed. Returns `out`.

    Raises Skip when other code made the file.
    """
    with zipfile.ZipFile(path) as packed:
        if packed.read(_CODE).decode() != contents.code:
            raise Skip(f"{path.name} was packed by other code; {_REMAKE}")
        state = contents.state()
        with atomic_folder(out) as temporary:
            for name in sorted({Path(entry).parts[0] for entry in packed.namelist() if "/" in entry}):
                _with_weights(packed, name, state, temporary / name)
    return out


def artifacts_of(setting: Setting, contents: Contents) -> Path:
    """The folder with the ONNX artifacts: those of this run, else of a packed file, else exported here.

    Raises Skip when there is no packed file and onnxscript is not installed.
    """
    made, path = setting.work / contents.name, setting.graphs / f"{contents.name}.zip"
    if made.is_dir():
        return made
    if path.is_file():
        return unpack(path, contents, made)
    if importlib.util.find_spec("onnxscript") is None:
        raise Skip(f"an ONNX export needs onnxscript, and {path.name} is not there; {_REMAKE}")
    folder = setting.build / f"{contents.name}-onnx"
    contents.export(folder)
    return folder


def _without_weights(path: Path, pantry: Pantry) -> tuple[bytes, dict[str, Recipe]]:
    """The graph's bytes without its large initializers, and their recipes."""
    model = onnx.load(path)
    recipes: dict[str, Recipe] = {}
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype.kind != "f" or value.size < _SMALLEST or value.ndim > 2:
            continue
        recipe = pantry.recipe(value)
        if recipe is not None:
            recipes[tensor.name] = recipe
            tensor.ClearField("raw_data")
        elif value.size > _LARGEST_KEPT:
            raise ValueError(
                f"{tensor.name} of {path.parent.name} must consist of rows or columns of the state dict, got others"
            )
    for node in model.graph.node:  # the lines of source code that nodes came from, most of the file
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return model.SerializeToString(deterministic=True), recipes


def _with_weights(packed: zipfile.ZipFile, name: str, state: State, folder: Path) -> None:
    model = onnx.load_from_string(packed.read(f"{name}/{ONNX_FILE}"))
    texts: dict[str, Any] = json.loads(packed.read(f"{name}/{_RECIPES}"))
    recipes = {each: Recipe(tuple(map(tuple, text["pieces"])), text["transposed"]) for each, text in texts.items()}
    folder.mkdir(parents=True)
    data = folder / f"{ONNX_FILE}.data"
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name in recipes:
                content = recipes[tensor.name].make(state).tobytes()
                tensor.raw_data = b""  # set_external_data wants the field to be there
                onnx.external_data_helper.set_external_data(tensor, data.name, offset=file.tell(), length=len(content))
                tensor.ClearField("raw_data")
                file.write(content)
    (folder / ONNX_FILE).write_bytes(model.SerializeToString(deterministic=True))
    manifest = Manifest(**json.loads(packed.read(f"{name}/{MANIFEST}")))
    dataclasses.replace(manifest, files=file_digests(folder)).write(folder)


def main(arguments: list[str] | None = None) -> int:
    """Packs the graphs that a check on a bare GPU machine needs."""
    parser = argparse.ArgumentParser(prog="gpu-check-graphs", description="Pack graphs without weights for gpu-check.")
    parser.add_argument("--preset", action="append", help="repeatable; default v2-0 and v2-mini")
    parser.add_argument("--precision", default="fp16", choices=("fp16", "fp32"), help="fp16 for a GPU, fp32 for a CPU")
    parser.add_argument("--out", type=Path, default=Path("build") / "gpu-check-graphs", help="folder for the packed files")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    for preset in options.preset or ("v2-0", "v2-mini"):
        for form in GUIDED_FORMS:
            pack(Contents(preset, options.precision, form), options.out)
        pack(Contents(preset, options.precision, network="vae"), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
