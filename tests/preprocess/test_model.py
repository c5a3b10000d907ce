"""Preprocessing as Triton's Python backend calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_preprocessing
import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from model_code import load_model

from hunyuan3d_client import contract


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """arguments(**parameters): what Triton hands to `initialize`, beside a deployed encoder of two views."""
    version = tmp_path / contract.CONDITIONER / "1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(json.dumps({"serving": {"image_size": 28, "views": 2}}))

    def make(**parameters: str) -> dict[str, str]:
        config = {"parameters": {name: {"string_value": text} for name, text in parameters.items()}}
        folder = str(tmp_path / contract.PREPROCESS)
        return {"model_config": json.dumps(config), "model_repository": folder, "model_version": "1"}

    return make


@pytest.fixture
def model(arguments: Callable[..., dict[str, str]]) -> Any:
    served = load_model(contract.PREPROCESS).TritonPythonModel()
    served.initialize(arguments(needs=contract.CONDITIONER))
    return served


def request_of(*images: bytes) -> pb_utils.Request:
    return pb_utils.Request({"image": np.array([*images, None], np.object_)[:-1]})


def test_each_failure_is_the_error_of_its_own_request(model: Any, photograph: Callable[[str], bytes]) -> None:
    file = photograph("rocket.jpg")
    first, *failed, last = model.execute(
        [request_of(file), request_of(b"no picture"), request_of(), request_of(file, file, file), request_of(file, file)]
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
    two, none = [response.error().message() for response in served.execute([request_of(b"a", b"b"), request_of()])]
    assert two.startswith("image must hold 1 picture, got 2\nhint: ") and "hunyuan3d-export conditioner --views 4" in two
    assert none == "image must hold 1 picture, got 0"


def test_an_unknown_parameter_is_refused(arguments: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="parameters must be none, got size"):
        load_model(contract.PREPROCESS).TritonPythonModel().initialize(arguments(size="518"))
