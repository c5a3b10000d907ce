"""Pictures through a real server: preprocessing, the encoder, the ensembles, and the client that composes them."""

from __future__ import annotations

import io
import json
import queue
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import image_preprocessing
import numpy as np
import pytest
import skimage
import torch
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hunyuan3d_client import Client, InvalidInput, ModelNotReady, cli, contract
from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.conditioner import Conditioner, random_conditioner
from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import DeployError, deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints, loadable_models

pytestmark = pytest.mark.served

DATA = Path(skimage.__file__).parent / "data"
ROCKET, COFFEE = DATA / "rocket.jpg", DATA / "coffee.png"
OPTIONS = {"steps": 6, "num_latents": 7, "seed": 3}
WAIT_S = 60.0


@pytest.fixture(scope="module")
def repository(root: Path, artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro denoisers and a tiny multi-view encoder, deployed one after the other."""
    folder = tmp_path_factory.mktemp("images") / "repository"
    encoder = root / "build" / "test" / "conditioner-fp32-op-4"
    export_onnx(ConditionerSource(views=4), encoder)
    with pytest.raises(DeployError, match="must hold a deployed denoiser for the image encoder to join, found none\nhint: "):
        deploy(encoder, folder)
    deploy(artifacts(), folder)
    assert not set(loadable_models(folder, "cpu")) & (
        set(contract.MODELS) - {contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY}
    )
    assert deploy(encoder, folder) == [contract.CONDITIONER]
    return folder


@pytest.fixture(scope="module")
def endpoints(repository: Path) -> Iterator[Endpoints]:
    with EmbeddedServer(repository) as endpoints:
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
def encoder() -> Conditioner:
    return random_conditioner("tiny", views=4)


def inputs_of(images: list[bytes], **options: int) -> list[triton.InferInput]:
    tensors = {"image": np.array([*images, None], np.object_)[:-1]}
    types = {spec.name: spec.numpy_dtype for spec in contract.SAMPLER_INPUTS}
    tensors |= {name: np.array([value], types[name]) for name, value in options.items()}
    inputs = [triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)) for name, value in tensors.items()]
    return [tensor.set_data_from_numpy(value) for tensor, value in zip(inputs, tensors.values(), strict=True)]


def streamed(url: str, images: list[bytes], **options: int) -> list[dict[str, np.ndarray]]:
    """Every response of the ensemble `hunyuan3d_latents`."""
    answers: queue.Queue[Any] = queue.Queue()
    found: list[dict[str, np.ndarray]] = []
    with triton.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(contract.PICTURE_LATENTS, inputs_of(images, **options))
        while not found or found[-1]["step"] < found[-1]["total"]:
            result, error = answers.get(timeout=WAIT_S)
            if error is not None:
                raise error
            found.append({output.name: result.as_numpy(output.name) for output in result.get_response().outputs})
        client.stop_stream()
    return found


def test_what_is_served(client: Client) -> None:
    ready = {model.name for model in client.health().models if model.ready}
    lacking = {contract.BACKGROUND, contract.VAE, contract.FIELD, contract.MESH, contract.MESH_UNARY}
    assert ready == set(contract.MODELS) - lacking - {contract.PICTURE_MESH, contract.PICTURE_MESH_UNARY}


@pytest.mark.parametrize("files", [[ROCKET], [COFFEE, ROCKET]], ids=["one view", "two views"])
def test_the_condition_is_torchs(files: list[Path], client: Client, encoder: Conditioner) -> None:
    found = client.condition(files)
    pixels = image_preprocessing.pixels([path.read_bytes() for path in files], 518)
    expected = encoder(torch.from_numpy(pixels))
    assert found.dtype == np.float16 and relative_l2(torch.tensor(found), expected) <= 1e-4


def test_the_ensemble_is_condition_then_sample(client: Client, endpoints: Endpoints) -> None:
    separate = client.sample(client.condition(ROCKET), **OPTIONS)
    responses = streamed(endpoints.grpc, [ROCKET.read_bytes()], preview_every=2, **OPTIONS)
    np.testing.assert_array_equal(responses[-1]["latents"], separate)
    assert [int(response["step"][0]) for response in responses] == [1, 2, 3, 4, 5, 6]
    assert [int(response["step"][0]) for response in responses if "latents" in response] == [2, 4, 6]
    assert relative_l2(torch.tensor(separate), torch.tensor(client.sample(client.condition(COFFEE), **OPTIONS))) > 1e-2


def test_the_unary_ensemble_and_the_latents_for_the_vae(raw: triton.InferenceServerClient, client: Client) -> None:
    context = client.condition(ROCKET)
    found = raw.infer(contract.PICTURE_LATENTS_UNARY, inputs_of([ROCKET.read_bytes()], **OPTIONS), client_timeout=WAIT_S)
    latents = found.as_numpy("latents")
    np.testing.assert_array_equal(latents, client.sample(context, **OPTIONS))
    assert found.as_numpy("vae_latents") is None
    options = inputs_of([b""], **OPTIONS)[1:]
    tensor = triton.InferInput("context", list(context.shape), "FP16").set_data_from_numpy(context)
    wanted = [triton.InferRequestedOutput(name) for name in ("latents", "vae_latents")]
    sampled = raw.infer(contract.SAMPLER_UNARY, [tensor, *options], outputs=wanted, client_timeout=WAIT_S)
    np.testing.assert_array_equal(sampled.as_numpy("latents"), latents)
    np.testing.assert_array_equal(sampled.as_numpy("vae_latents"), latents / np.float32(PRESETS["v2-0"].scale_factor))
    assert not np.array_equal(sampled.as_numpy("vae_latents"), latents)
    wanted = [triton.InferRequestedOutput("latents")]
    only = raw.infer(contract.PICTURE_LATENTS_UNARY, inputs_of([ROCKET.read_bytes()], **OPTIONS), outputs=wanted)
    assert [output.name for output in only.get_response().outputs] == ["latents"]


def test_the_unary_ensemble_over_http(endpoints: Endpoints) -> None:
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["no picture"]}]}
    request = urllib.request.Request(
        f"http://{endpoints.http}/v2/models/{contract.PICTURE_LATENTS_UNARY}/infer", json.dumps(body).encode(), method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=WAIT_S)
    assert caught.value.code == 400 and "image must be a PNG, JPEG or WebP file" in json.loads(caught.value.read())["error"]


def test_every_kind_of_picture(client: Client) -> None:
    with Image.open(COFFEE) as opened:
        picture = opened.convert("RGB")
    expected = client.condition(COFFEE)
    for same in (str(COFFEE), COFFEE.read_bytes(), picture, np.asarray(picture), [picture], (COFFEE,)):
        np.testing.assert_array_equal(client.condition(same), expected)
    assert client.condition([COFFEE] * 4).shape == (1, 4 * 1370, 1536)


def test_bad_pictures_are_the_callers_fault_and_the_server_stays_up(client: Client) -> None:
    for bad, message in (
        (b"no picture", "image must be a PNG, JPEG or WebP file, got b'no pictu'"),
        (COFFEE.read_bytes()[:9000], "image must be a whole PNG, JPEG or WebP file"),
        ([ROCKET, b""], "view 2: image must be of 1 to 33554432 bytes, got 0"),
        (np.zeros((9, 9, 4), np.uint8), "image must show something, got an alpha channel of zeros"),
    ):
        with pytest.raises(InvalidInput, match=message):
            client.condition(bad)
    assert client.condition(ROCKET).shape == (1, 1370, 1536)


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files_leave_the_server_up(count: int, raw: triton.InferenceServerClient, client: Client) -> None:
    file = io.BytesIO()
    with Image.open(COFFEE) as picture:
        picture.resize((30, 20)).save(file, "PNG")
    generator, refused = random.Random(1), 0
    for _ in range(count):
        spoilt = bytearray(file.getvalue())
        for _ in range(3):
            spoilt[generator.randrange(len(spoilt))] = generator.randrange(256)
        try:
            raw.infer(contract.PREPROCESS, inputs_of([bytes(spoilt)]), client_timeout=WAIT_S)
        except InferenceServerException as error:
            refused += 1
            assert error.status() == "StatusCode.INVALID_ARGUMENT" and "image must be " in error.message()
    assert refused > count / 4
    assert client.condition(ROCKET).shape == (1, 1370, 1536)


def denoiser_calls(endpoints: Endpoints) -> int:
    with urllib.request.urlopen(f"http://{endpoints.http}/v2/models/{contract.DIT_GUIDED}/stats", timeout=WAIT_S) as answer:
        return int(json.load(answer)["model_stats"][0]["inference_count"])


def calls_after(endpoints: Endpoints) -> int:
    """The number of the denoiser's calls once it has not grown for 2 s, or after 20 s."""
    deadline, calls, since = time.monotonic() + 20, denoiser_calls(endpoints), time.monotonic()
    while time.monotonic() < min(deadline, since + 2):
        if (now := denoiser_calls(endpoints)) != calls:
            calls, since = now, time.monotonic()
    return calls


def test_generate_says_how_to_get_latents_where_no_decoder_is_deployed(client: Client, endpoints: Endpoints) -> None:
    before = denoiser_calls(endpoints)
    with pytest.raises(ModelNotReady, match=r"hunyuan3d_mesh must be ready .*\nhint: for latents, call condition\(\)"):
        client.generate(ROCKET, **OPTIONS)
    assert denoiser_calls(endpoints) == before


def test_leaving_a_stream_frees_the_sampler_though_an_ensemble_would_not(client: Client, endpoints: Endpoints) -> None:
    """Triton 24.10 does not cancel the models of a cancelled ensemble, so the client streams the sampler itself."""
    before = denoiser_calls(endpoints)
    for step in client.stream(client.condition(ROCKET), steps=1000, num_latents=7, guidance_scale=5.0):
        if step.index == 3:
            break
    assert 3 <= calls_after(endpoints) - before <= 8, "steps made while the news of the cancelling travelled"
    before = denoiser_calls(endpoints)
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(endpoints.grpc) as raw:
        raw.start_stream(lambda result, error: answers.put((result, error)))
        raw.async_stream_infer(contract.PICTURE_LATENTS, inputs_of([ROCKET.read_bytes()], steps=60, num_latents=7))
        assert answers.get(timeout=WAIT_S)[1] is None
        raw.stop_stream(cancel_requests=True)
    assert calls_after(endpoints) - before == 59, "cancelling an ensemble reaches the sampler now: compose no longer"


def test_the_command(endpoints: Endpoints, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "latents.npy"
    arguments = ["generate", str(ROCKET), "--out", str(out), "--url", endpoints.grpc, "--steps", "6", "--num-latents", "7"]
    monkeypatch.setattr(sys, "argv", ["hunyuan3d", *arguments, "--seed", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.app()
    assert ended.value.code == 0
    np.testing.assert_array_equal(np.load(out), client.sample(client.condition(ROCKET), **OPTIONS))


def test_a_server_without_an_encoder_says_so(served: Endpoints) -> None:
    with Client(served.grpc) as client, pytest.raises(ModelNotReady, match="hunyuan3d_context"):
        client.generate(ROCKET)
