"""What a request for a mesh may hold, and the parameters of config.pbtxt that its defaults come from."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import mesh_files
import mesh_request
import numpy as np
import pytest
import surface
from google.protobuf import text_format
from mesh_settings import MeshSettings
from parameters import parse
from tritonclient.grpc import model_config_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent))

from decoding_doubles import LATENTS, PARAMETERS, settings

from hunyuan3d_client import contract

DEFAULTS = settings().defaults


def test_the_servers_tables_are_the_contracts() -> None:
    assert mesh_files.FORMATS == contract.MESH_FORMATS and surface.METHODS == contract.MESH_METHODS
    assert contract.RESOLUTIONS == (surface.LEAST_RESOLUTION, surface.MOST_RESOLUTION)
    assert (mesh_request.CHANNELS, mesh_request.MOST_LATENTS) == (contract.LATENT_CHANNELS, contract.AXES["L"].max)
    fields = [field.name for field in dataclasses.fields(mesh_request.MeshRequest)]
    assert fields == [spec.name for spec in contract.MESH_OPTIONS]


def test_options_take_the_place_of_defaults() -> None:
    latents, request = mesh_request.decode({"latents": LATENTS}, DEFAULTS)
    assert request == DEFAULTS and latents is LATENTS
    values = {"resolution": 384, "format": "stl", "max_faces": 40_000, "keep": 0.5, "level": 0.25, "method": "dense"}
    tensors = {"latents": LATENTS}
    for spec in contract.MESH_OPTIONS:
        value = values[spec.name]
        tensors[spec.name] = np.array([value.encode() if isinstance(value, str) else value], spec.numpy_dtype)
    _, request = mesh_request.decode(tensors, DEFAULTS)
    assert dataclasses.asdict(request) == values


def one(name: str, value: object) -> dict[str, np.ndarray]:
    spec = next(spec for spec in contract.MESH_OPTIONS if spec.name == name)
    return {"latents": LATENTS, name: np.array([value], spec.numpy_dtype)}


BAD = [
    ({}, "latents must be given"),
    ({"latents": LATENTS[0]}, r"latents must be \[1, 1..4096, 64\], got shape \[5, 64\]"),
    ({"latents": np.zeros((2, 5, 64), np.float32)}, r"got shape \[2, 5, 64\]\nhint: send each shape"),
    ({"latents": np.zeros((1, 0, 64), np.float32)}, "got shape"),
    ({"latents": np.zeros((1, 4097, 64), np.float32)}, "got shape"),
    ({"latents": np.full((1, 5, 64), np.inf, np.float32)}, "latents must be finite"),
    ({"latents": LATENTS, "keep": np.zeros(2, np.float32)}, r"keep must hold one value, got shape \[2\]"),
    (one("resolution", 7), "resolution must be in 8..1024, got 7"),
    (one("resolution", 1025), "resolution must be in"),
    (one("format", b"fbx"), "format must be glb or obj or stl or ply, got 'fbx'"),
    (one("format", b"\xff"), "format must be"),
    (one("method", b""), "method must be follow or dense, got ''"),
    (one("max_faces", 3), "max_faces must be 0 or 4.."),
    (one("max_faces", -1), "max_faces must be"),
    (one("keep", np.nan), "keep must be in 0..1, got nan"),
    (one("keep", 1.5), "keep must be in 0..1"),
    (one("level", np.nan), "level must be in"),
    (one("level", 0.95), "level must be in"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_requests_are_refused_with_a_hint(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mesh_request.decode(tensors, DEFAULTS)
    assert "\nhint: " in str(caught.value)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_checked(name: str) -> None:
    parse(MeshSettings, PARAMETERS)
    with pytest.raises(ValueError, match=name):
        parse(MeshSettings, {**PARAMETERS, name: "-1"})
    with pytest.raises(ValueError, match="parameters must be"):
        parse(MeshSettings, {key: value for key, value in PARAMETERS.items() if key != name})


def test_calls_leave_room_in_the_fields_queue() -> None:
    with pytest.raises(ValueError, match="field_calls must be at most 32, got 33"):
        parse(MeshSettings, {**PARAMETERS, "field_calls": "33"})


@pytest.mark.parametrize("name", ["config.pbtxt", "configs/cpu.pbtxt"])
def test_the_configs_in_git_are_readable(name: str, root: Path) -> None:
    config = text_format.Parse((root / "model_repository" / contract.MESH / name).read_text(), pb.ModelConfig())
    chosen = parse(MeshSettings, {key: value.string_value for key, value in config.parameters.items()})
    assert chosen.defaults == mesh_request.MeshRequest(
        resolution=256, format="glb", max_faces=0, keep=0.005, level=0.0, method="follow"
    )
    field = text_format.Parse((root / "model_repository" / contract.FIELD / name).read_text(), pb.ModelConfig())
    assert chosen.field_calls <= field.dynamic_batching.default_queue_policy.max_queue_size / 2
