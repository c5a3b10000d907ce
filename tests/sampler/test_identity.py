"""The sampler tells the weights of each model in its repository, as the export reads them from the manifests."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from doubles import PARAMETERS
from identity import deployed_weights
from model_code import load_model

from hunyuan3d_client import contract
from hunyuan3d_client.identity import parse
from hunyuan3d_export.identity import deployed, weights_of
from hunyuan3d_export.manifest import Manifest

WEIGHTS = {
    contract.DIT: ({"preset": None, "checkpoint_sha256": "ab" * 32}, {"name": "v2-mini"}),
    contract.VAE: ({"preset": "tiny", "seed": 4, "scale_factor": 1.0}, {"name": "tiny"}),
    contract.CONDITIONER: ({"variant": "tiny", "seed": 5}, {"image_size": 518, "views": 1}),
}


def repository(folder: Path) -> Path:
    for model, (weights, serving) in WEIGHTS.items():
        version = folder / model / "1"
        version.mkdir(parents=True)
        made_from = {"weights": weights, "precision": "fp16"}
        Manifest(model=model, made_from=made_from, serving=serving, versions={}, files={"f": "0"}).write(version)
    return folder


def test_the_sampler_and_the_export_read_the_same(tmp_path: Path) -> None:
    found = deployed_weights(repository(tmp_path), "1")
    expected = {model: weights_of(manifest) for model, manifest in deployed(tmp_path).items()}
    assert parse(json.dumps(found)) == expected and expected.keys() == WEIGHTS.keys()
    assert [expected[model].random for model in WEIGHTS] == [False, True, True]


def test_a_file_of_another_form_is_left_out(tmp_path: Path) -> None:
    for name, text in {"a": "no JSON", "b": "{}", "c": '{"made_from": {"weights": null}, "serving": {}}', "d": "[]"}.items():
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "manifest.json").write_text(text)
    assert deployed_weights(tmp_path, "1") == {}


def test_a_request_for_this_output_alone_is_answered_without_a_sample(tmp_path: Path) -> None:
    spec = contract.MODELS[contract.SAMPLER]
    config = {"input": [], "output": [], "parameters": {name: {"string_value": text} for name, text in PARAMETERS.items()}}
    model = load_model(spec.name).TritonPythonModel()
    place = repository(tmp_path) / contract.SAMPLER
    model.initialize({"model_config": json.dumps(config), "model_repository": str(place), "model_version": "1"})
    request = pb_utils.Request({"context": np.zeros((1, 1, 1536), np.float16)}, outputs=[contract.SERVED.name])
    asyncio.run(model.execute([request]))
    ((response, flags),) = request.sender.sent
    assert flags == pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL and response.arrays.keys() == {contract.SERVED.name}
    (text,) = response.arrays[contract.SERVED.name]
    assert parse(text.decode())[contract.DIT] == weights_of(deployed(tmp_path)[contract.DIT])
    assert dataclasses.asdict(parse(text.decode())[contract.DIT])["preset"] == "v2-mini"
