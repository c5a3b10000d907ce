"""Photographs through a real server: the background removed before the encoder, by a small network in place of U²-Net."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import image_preprocessing
import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from saliency_models import write_model
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hunyuan3d_client import Client, InvalidInput, cli, contract
from hunyuan3d_export.background.weights import BackgroundSource
from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints

pytestmark = pytest.mark.served

WAIT_S = 60.0
OPTIONS = {"steps": 2, "num_latents": 5, "seed": 3}


@pytest.fixture(scope="module")
def endpoints(root: Path, artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    folder = tmp_path_factory.mktemp("background")
    encoder = root / "build" / "test" / "conditioner-fp32-op-4"
    export_onnx(ConditionerSource(views=4), encoder)
    export_onnx(BackgroundSource(path=write_model(folder / "small.onnx"), family="isnet"), folder / "artifacts")
    for each in (artifacts(), encoder, folder / "artifacts"):
        deploy(each, folder / "repository")
    with EmbeddedServer(folder / "repository") as endpoints:
        yield endpoints


@pytest.fixture(scope="module")
def client(endpoints: Endpoints) -> Iterator[Client]:
    with Client(endpoints.grpc, timeout_s=120) as client:
        yield client


@pytest.fixture(scope="module")
def raw(endpoints: Endpoints) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(endpoints.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def photograph() -> bytes:
    """A bright, textured rectangle before a dark ground: 15 x 20 of 60 x 80 pixels."""
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 60, (60, 80, 3), dtype=np.uint8)
    picture[20:35, 30:50] = generator.integers(200, 256, (15, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def request_of(*images: bytes, **options: int | bool) -> list[triton.InferInput]:
    tensors = {"image": np.array([*images, None], np.object_)[:-1]}
    types = {spec.name: spec.numpy_dtype for spec in (*contract.SAMPLER_INPUTS, contract.REMOVE_BACKGROUND)}
    tensors |= {name: np.array([value], types[name]) for name, value in options.items()}
    inputs = [triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)) for name, value in tensors.items()]
    return [tensor.set_data_from_numpy(value) for tensor, value in zip(inputs, tensors.values(), strict=True)]


def test_the_subject_is_cut_out_and_the_same_file_gives_the_same_condition(client: Client, photograph: bytes) -> None:
    cut = client.cutout(photograph)
    assert cut.background == contract.REMOVED and cut.subject_share == pytest.approx(1 / 16, abs=0.02)
    alpha = np.asarray(image_preprocessing.decode(cut.data))[..., 3]
    assert alpha[27, 40] > 230 and alpha[5, 5] == 0 and {0, 255} < set(alpha.ravel())
    removed, whole = client.condition(photograph), client.condition(photograph, remove_background=False)
    np.testing.assert_array_equal(removed, client.condition(cut.data))
    assert not np.array_equal(removed, whole)
    assert client.cutout(cut.data).background == contract.TRANSPARENT


def test_every_ensemble_that_does_not_stream_tells_the_facts(raw: triton.InferenceServerClient, photograph: bytes) -> None:
    for model, options in ((contract.IMAGE_CONTEXT, {}), (contract.PICTURE_LATENTS_UNARY, OPTIONS)):
        for remove, told, share in ((True, b"removed", 1 / 16), (False, b"kept", 1.0)):
            found = raw.infer(model, request_of(photograph, remove_background=remove, **options), client_timeout=WAIT_S)
            assert found.as_numpy("background").tolist() == [told]
            assert found.as_numpy("subject_share")[0] == pytest.approx(share, abs=0.02)
    only = [triton.InferRequestedOutput("context")]
    found = raw.infer(contract.IMAGE_CONTEXT, request_of(photograph), outputs=only, client_timeout=WAIT_S)
    assert [output.name for output in found.get_response().outputs] == ["context"], "no step is dropped with the facts"


def test_a_picture_without_a_subject(client: Client, photograph: bytes) -> None:
    dark = np.zeros((20, 20, 3), np.uint8)
    for call in (client.condition, client.cutout):
        with pytest.raises(InvalidInput, match="image must show a subject that stands out .*\nhint: remove_background=False"):
            call(dark)
    with pytest.raises(InvalidInput, match="view 2: image must show a subject"):
        client.condition([photograph, dark])
    assert client.condition(dark, remove_background=False).shape == (1, 1370, 1536)


def test_pictures_at_the_same_time_share_the_network(
    raw: triton.InferenceServerClient, client: Client, photograph: bytes
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = client.cutout(photograph).data
    before = _counts(raw)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: client.cutout(photograph).data, range(48)))
    assert set(found) == {expected}
    evaluated, called = (after - was for after, was in zip(_counts(raw), before, strict=True))
    assert called == 48 and evaluated < 48


def _counts(raw: triton.InferenceServerClient) -> tuple[int, int]:
    (stats,) = raw.get_inference_statistics(contract.BACKGROUND).model_stats
    return stats.execution_count, stats.inference_count


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files_leave_the_server_up(
    count: int, raw: triton.InferenceServerClient, client: Client, photograph: bytes
) -> None:
    jpeg = io.BytesIO()
    image_preprocessing.decode(photograph).save(jpeg, "JPEG")
    generator, refused = random.Random(7), 0
    for index in range(count):
        spoilt = bytearray((photograph, jpeg.getvalue())[index % 2])
        for _ in range(3):
            spoilt[generator.randrange(len(spoilt))] = generator.randrange(256)
        try:
            raw.infer(contract.PREPROCESS, request_of(bytes(spoilt)), client_timeout=WAIT_S)
        except InferenceServerException as error:
            refused += 1
            assert error.status() == "StatusCode.INVALID_ARGUMENT" and "image must " in error.message()
    assert count / 8 < refused < count
    assert client.cutout(photograph).background == contract.REMOVED


def test_levels_outside_their_range_are_refused(raw: triton.InferenceServerClient) -> None:
    for value in (-1, 256, np.nan):
        tensor = triton.InferInput("rgb", [1, 3, 32, 32], "FP32").set_data_from_numpy(
            np.full((1, 3, 32, 32), value, np.float32)
        )
        with pytest.raises(InferenceServerException, match="rgb must be"):
            raw.infer(contract.BACKGROUND, [tensor], client_timeout=WAIT_S)


def test_the_commands(
    endpoints: Endpoints, client: Client, photograph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, cut = tmp_path / "photo.png", tmp_path / "cut.png"
    file.write_bytes(photograph)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hunyuan3d", *arguments, "--url", endpoints.grpc])
        with pytest.raises(SystemExit) as ended:
            cli.app()
        assert ended.value.code == 0
        return capsys.readouterr().out

    facts = json.loads(run("cutout", str(file), "--out", str(cut), "--json"))
    assert facts["background"] == "removed" and facts["subject_share"] == pytest.approx(1 / 16, abs=0.02)
    assert cut.read_bytes() == client.cutout(photograph).data
    sampling = ["--steps", "2", "--num-latents", "5", "--seed", "3"]
    for name, more in (("removed", []), ("kept", ["--keep-background"])):
        run("generate", str(file), "--out", str(tmp_path / f"{name}.npy"), *sampling, *more)
        context = client.condition(photograph, remove_background=name == "removed")
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), client.sample(context, **OPTIONS))
    run(
        "batch",
        str(tmp_path / "photo.png"),
        "--out",
        str(tmp_path / "batch"),
        "--format",
        "npy",
        *sampling,
        "--keep-background",
    )
    np.testing.assert_array_equal(np.load(tmp_path / "batch" / "photo.npy"), np.load(tmp_path / "kept.npy"))
