"""Pictures in every form a caller may have them, and the three requests of generate; no server."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from hunyuan3d_client import (
    AsyncClient,
    Client,
    InvalidInput,
    Mesh,
    MeshProgress,
    MockTransport,
    ModelFailed,
    ModelNotReady,
    Request,
    Step,
    contract,
)
from hunyuan3d_client.pictures import image_inputs, png
from hunyuan3d_client.transport import Tensors

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda size: st.sampled_from([size, (*size, 1), (*size, 3), (*size, 4)])
)


@given(pixels=arrays(np.uint8, SHAPES))
def test_png_is_read_back_as_it_was(pixels: np.ndarray) -> None:
    with Image.open(io.BytesIO(png(pixels))) as opened:
        opened.load()
        np.testing.assert_array_equal(np.asarray(opened), pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def test_files_keep_every_byte(tmp_path: Path) -> None:
    data = b"\x89PNG with zeros at its end\0\0\0"
    (tmp_path / "a.png").write_bytes(data)
    for value in (data, bytearray(data), memoryview(data), tmp_path / "a.png", str(tmp_path / "a.png")):
        tensor = image_inputs(value)["image"]
        assert (tensor.shape, tensor.dtype, tensor[0]) == ((1,), np.object_, data)
    assert image_inputs([data, data])["image"].tolist() == [data, data]


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 3), ("CMYK", 3), ("RGBA", 4), ("LA", 4), ("PA", 4)])
def test_pil_images_keep_their_alpha(mode: str, channels: int) -> None:
    (file,) = image_inputs(Image.new("RGBA", (4, 3), (1, 2, 3, 4)).convert(mode))["image"]
    with Image.open(io.BytesIO(file)) as opened:
        assert np.asarray(opened).shape == (3, 4, channels)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "image must be 1 to 4 views, got 0"),
        ([b"x"] * 5, "image must be 1 to 4 views, got 5"),
        (np.zeros((4, 4, 3), np.float32), r"got float32 \[4, 4, 3\]\nhint: floats in"),
        (np.zeros((4, 4, 2), np.uint8), r"got uint8 \[4, 4, 2\]"),
        (np.zeros((0, 4), np.uint8), r"got uint8 \[0, 4\]"),
        (7, "image must be a path, .* got int"),
        ("nowhere.png", "image must be a readable file, got "),
        ("a\0b", "image must be a readable file, got "),
    ],
    ids=str,
)
def test_what_is_no_picture(value: object, message: str) -> None:
    with Client(transport=MockTransport()) as client, pytest.raises(InvalidInput, match=message):
        client.condition(value)


def test_generate_asks_for_the_condition_and_streams_the_sampler_and_the_decoder() -> None:
    transport = MockTransport()
    with Client(transport=transport) as client:
        assert client.condition([b"a", b"b"]).shape == (1, 2 * 1370, 1536)
        mesh = client.generate(b"picture", num_latents=9, steps=4, seed=5, format="obj", max_faces=7)
        assert mesh.format == "obj" and mesh.latents is not None and mesh.latents.shape == (1, 9, 64)
        stages = list(client.generate_stream(b"picture", num_latents=9))
    assert [type(stage) for stage in stages] == [Step, Step, Step, MeshProgress, Mesh]
    assert [step.index for step in stages[:3]] == [1, 2, 3]
    asked = transport.requests[1:4]
    assert [request.model for request in asked] == [contract.IMAGE_CONTEXT, contract.SAMPLER, contract.MESH]
    assert asked[0].inputs["image"].tolist() == [b"picture"] and not asked[0].streamed
    meshing = {name: value.tolist() for name, value in asked[2].inputs.items()}
    assert meshing.pop("latents") == mesh.latents.tolist() and meshing == {"format": [b"obj"], "max_faces": [7]}
    options = {name: value.tolist() for name, value in asked[1].inputs.items() if name != "context"}
    assert options == {"steps": [4], "seed": [5], "num_latents": [9], "preview_every": [0]} and asked[1].streamed


def test_all_requests_share_one_deadline() -> None:
    transport = MockTransport()
    with Client(transport=transport) as client:
        client.generate(b"picture", timeout_s=50)
    assert 50 >= transport.timeouts_s[0] >= transport.timeouts_s[1] >= transport.timeouts_s[2] > 40


def test_a_server_without_meshes_is_found_out_before_sampling() -> None:
    transport = MockTransport()
    del transport.models[contract.MESH]
    with Client(transport=transport) as client:
        with pytest.raises(
            ModelNotReady, match=r"hunyuan3d_mesh must be ready .*\nhint: for latents, call condition\(\) and then"
        ):
            client.generate(b"picture")
        assert transport.requests == []
        assert client.sample(client.condition(b"picture")).shape == (1, 512, 64)


def test_a_bad_option_of_the_mesh_is_found_out_at_once() -> None:
    transport = MockTransport()
    with Client(transport=transport) as client:
        for bad in (
            {"resolution": 7},
            {"resolution": 1025},
            {"format": "fbx"},
            {"method": "fast"},
            {"max_faces": -1},
            {"keep": "x"},
        ):
            with pytest.raises(InvalidInput, match=f"{next(iter(bad))} must be "):
                client.generate_stream(b"picture", **bad)


def test_leaving_the_loop_cancels_the_trajectory() -> None:
    transport = MockTransport()
    with Client(transport=transport) as client:
        steps = client.generate_stream(b"picture")
        next(steps)
        steps.close()
    assert transport.cancelled == [transport.requests[-1].request_id]


def test_leaving_the_loop_cancels_the_decode() -> None:
    transport = MockTransport()
    with Client(transport=transport) as client:
        for stage in client.generate_stream(b"picture"):
            if isinstance(stage, MeshProgress):
                break
    assert transport.requests[-1].model == contract.MESH
    assert transport.cancelled == [transport.requests[-1].request_id]


@pytest.mark.parametrize("context", [None, np.zeros((1, 5, 1536), np.float32), np.zeros((2, 5, 1536), np.float16)], ids=str)
def test_an_answer_that_is_no_condition(context: np.ndarray | None) -> None:
    def answer(_: Request) -> list[Tensors]:
        return [{} if context is None else {"context": context}]

    with Client(transport=MockTransport(answer)) as client, pytest.raises(ModelFailed, match="context must be float16"):
        client.condition(b"picture")


def test_the_asynchronous_client_has_the_same_calls() -> None:
    for name in ("condition", "decode", "decode_stream", "generate", "generate_stream"):
        assert getattr(Client, name).__wrapped__ is getattr(AsyncClient, name)


@pytest.mark.parametrize(
    "options", [{"steps": -3}, {"seed": -1}, {"num_latents": 0}, {"schedule": "x"}, {"format": "x"}], ids=str
)
def test_wrong_options_are_refused_before_the_picture_is_sent(options: dict[str, Any]) -> None:
    transport = MockTransport()
    with Client(transport=transport) as client, pytest.raises(InvalidInput, match=f"{next(iter(options))} must be"):
        client.generate(b"picture", **options)
    assert not transport.requests


@pytest.mark.parametrize("missing", [contract.SAMPLER, contract.MESH])
def test_a_server_without_a_stage_is_noticed_before_the_picture_is_sent(missing: str) -> None:
    transport = MockTransport()
    del transport.models[missing]
    with Client(transport=transport) as client, pytest.raises(ModelNotReady):
        client.generate(b"picture")
    assert not transport.requests


@pytest.mark.parametrize("image", [[], 7, np.zeros((4, 4), np.float32)], ids=str)
def test_what_is_no_picture_is_refused_at_once(image: Any) -> None:
    with Client(transport=MockTransport()) as client, pytest.raises(InvalidInput):
        client.generate_stream(image)
