"""Preprocessing as Triton's Python backend calls it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import image_preprocessing
import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from model_code import load_model
from PIL import Image

from hunyuan3d_client import contract


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """arguments(**parameters): what Triton hands to `initialize`, beside a deployed encoder of two views."""
    version = tmp_path / contract.CONDITIONER / "1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(json.dumps({"serving": {"image_size": 28, "views": 2}}))

    def make(**parameters: str) -> dict[str, str]:
        parameters = {"remove_background": "true", "evaluation_timeout_s": "5", **parameters}
        config = {"parameters": {name: {"string_value": text} for name, text in parameters.items()}}
        folder = str(tmp_path / contract.PREPROCESS)
        return {"model_config": json.dumps(config), "model_repository": folder, "model_version": "1"}

    return make


@pytest.fixture
def model(arguments: Callable[..., dict[str, str]]) -> Any:
    served = load_model(contract.PREPROCESS).TritonPythonModel()
    served.initialize(arguments(needs=contract.CONDITIONER))
    return served


def request_of(*images: bytes, outputs: Sequence[str] = (), **given: bool) -> pb_utils.Request:
    flags = {name: np.array([value]) for name, value in given.items()}
    return pb_utils.Request({"image": np.array([*images, None], np.object_)[:-1], **flags}, outputs=outputs)


def answers(model: Any, requests: list[pb_utils.Request]) -> list[pb_utils.InferenceResponse]:
    """The one response to each request."""

    async def main() -> None:
        await model.execute(requests)
        await asyncio.gather(*model._running)

    asyncio.run(main())
    assert [len(request.sender.sent) for request in requests] == [1] * len(requests)
    return [request.sender.sent[0][0] for request in requests]


@pytest.fixture
def remover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A deployed hunyuan3d_background, for which all that is bright is subject. The list gets the levels of each call."""
    version = tmp_path / contract.BACKGROUND / "1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text('{"serving": {"name": "u2netp", "side": 32, "batch": 8}}')
    calls: list[np.ndarray] = []

    async def answer(call: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        assert (call.options["model_name"], call.options["requested_output_names"]) == (contract.BACKGROUND, ["saliency"])
        calls.append(call.options["inputs"][0].as_numpy())
        return pb_utils.InferenceResponse([pb_utils.Tensor("saliency", (calls[-1].mean(axis=1, keepdims=True) > 128) * 1.0)])

    monkeypatch.setattr(pb_utils.InferenceRequest, "answer", staticmethod(answer), raising=False)
    return calls


def bright_square(encoded: Callable[..., bytes], level: int = 250) -> bytes:
    picture = Image.new("RGB", (64, 48), (20, 30, 40))
    picture.paste((level, level, 200), (8, 12, 40, 36))
    return encoded(picture)


def test_the_background_is_removed_where_a_remover_is_deployed(
    model: Any, remover: list[np.ndarray], encoded: Callable[..., bytes]
) -> None:
    file = bright_square(encoded)
    found = answers(model, [request_of(file)])[0].arrays
    assert found["background"].tolist() == [b"removed"] and found["subject_share"][0] == pytest.approx(0.25, abs=0.03)
    (levels,) = remover
    assert (levels.shape, levels.dtype) == ((1, 3, 32, 32), np.float32) and levels.max() > 200
    cut = image_preprocessing.decode(found["cutout"][0])
    assert cut.mode == "RGBA" and cut.getpixel((20, 20)) == (250, 250, 200, 255) and cut.getpixel((60, 4))[3] == 0
    np.testing.assert_array_equal(found["pixels"], image_preprocessing.pixels([found["cutout"][0]], 28))
    assert not np.array_equal(found["pixels"], image_preprocessing.pixels([file], 28))


def test_what_becomes_of_a_background_is_said(
    model: Any, arguments: Callable[..., dict[str, str]], remover: list[np.ndarray], encoded: Callable[..., bytes],
    cut_out: Image.Image, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, names = bright_square(encoded), ["background", "subject_share"]
    kept, own = answers(
        model, [request_of(file, remove_background=False, outputs=names), request_of(file, encoded(cut_out), outputs=names)]
    )
    assert kept.arrays["background"].tolist() == [b"kept"] and kept.arrays["subject_share"].tolist() == [1.0]
    assert own.arrays["background"].tolist() == [b"removed", b"transparent"] and set(own.arrays) == set(names)
    assert own.arrays["subject_share"][1] == pytest.approx(np.asarray(cut_out)[..., 3].mean() / 255)
    assert len(remover) == 1
    served = load_model(contract.PREPROCESS).TritonPythonModel()
    served.initialize(arguments(remove_background="false"))
    asked, unasked = answers(served, [request_of(file, remove_background=True), request_of(file)])
    assert [each.arrays["background"].tolist() for each in (asked, unasked)] == [[b"removed"], [b"kept"]]
    monkeypatch.setattr(pb_utils, "is_model_ready", lambda _name: False)
    without = answers(model, [request_of(file)])[0].arrays
    assert without["background"].tolist() == [b"kept: no remover"] and len(remover) == 2
    np.testing.assert_array_equal(without["pixels"], image_preprocessing.pixels([file], 28))
    assert {b.decode() for b in (b"removed", b"transparent", b"kept", b"kept: no remover")} == set(contract.BACKGROUNDS)


def test_a_picture_without_a_subject_is_its_own_requests_error(
    model: Any, remover: list[np.ndarray], encoded: Callable[..., bytes]
) -> None:
    empty = encoded(Image.new("RGB", (64, 48), (20, 30, 40)))
    good, bad, second = answers(
        model, [request_of(bright_square(encoded)), request_of(empty), request_of(bright_square(encoded), empty)]
    )
    assert not good.has_error() and [each.error().code() for each in (bad, second)] == ["INVALID_ARG"] * 2
    assert (
        bad.error().message().startswith("image must show a subject that stands out from its background, found a saliency of")
    )
    assert "\nhint: remove_background=False (in the shell --keep-background)" in bad.error().message()
    assert second.error().message().startswith("view 2: image must show a subject")
    assert len(remover) == 4


def test_a_remover_that_fails_is_not_the_callers_fault(
    model: Any, remover: list[np.ndarray], encoded: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = pb_utils.InferenceResponse(error=pb_utils.TritonError("out of memory"))
    wrong = pb_utils.InferenceResponse([pb_utils.Tensor("saliency", np.full((1, 1, 32, 32), np.nan))])
    for response, message in ((failed, "must answer, got out of memory"), (wrong, "saliency must be finite")):

        async def answer(_call: object, response: object = response) -> object:
            return response

        monkeypatch.setattr(pb_utils.InferenceRequest, "answer", staticmethod(answer), raising=False)
        error = answers(model, [request_of(bright_square(encoded))])[0].error()
        assert error.code() == "INTERNAL" and message in error.message()
    assert remover == []


def test_each_failure_is_the_error_of_its_own_request(model: Any, photograph: Callable[[str], bytes]) -> None:
    file = photograph("rocket.jpg")
    first, *failed, last = answers(
        model, [request_of(file), request_of(b"no picture"), request_of(), request_of(file, file, file), request_of(file, file)]
    )
    np.testing.assert_array_equal(first.arrays["pixels"], image_preprocessing.pixels([file], 28))
    assert last.arrays["pixels"].shape == (1, 2, 3, 28, 28)
    errors = [response.error() for response in failed]
    assert [error.code() for error in errors] == ["INVALID_ARG"] * 3
    assert "image must be a PNG, JPEG or WebP file" in errors[0].message()
    assert [error.message() for error in errors[1:]] == [f"image must hold 1 to 2 pictures, got {count}" for count in (0, 3)]


def test_an_encoder_of_one_view_names_the_option_for_more(arguments: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    made = arguments()
    (tmp_path / contract.CONDITIONER / "1" / "manifest.json").write_text('{"serving": {"image_size": 28, "views": 1}}')
    served = load_model(contract.PREPROCESS).TritonPythonModel()
    served.initialize(made)
    two, none = [response.error().message() for response in answers(served, [request_of(b"a", b"b"), request_of()])]
    assert two.startswith("image must hold 1 picture, got 2\nhint: ") and "hunyuan3d-export conditioner --views 4" in two
    assert none == "image must hold 1 picture, got 0"


def test_an_unknown_parameter_is_refused(arguments: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="parameters must be remove_background, evaluation_timeout_s, got .*size"):
        load_model(contract.PREPROCESS).TritonPythonModel().initialize(arguments(size="518"))
