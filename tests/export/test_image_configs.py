"""The image models' configs: those in git are the rendered ones, their tensors the contract's, their steps joined by name."""

from __future__ import annotations

from pathlib import Path

import batching
import onnx_graph
import parameters
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract
from hunyuan3d_export.conditioner.configs import config_files
from hunyuan3d_export.conditioner.weights import ConditionerServing
from hunyuan3d_export.pbtxt import artifact_file

# Ensemble -> its last step.
LAST_STEPS = {
    contract.IMAGE_CONTEXT: contract.CONDITIONER,
    contract.PICTURE_LATENTS: contract.SAMPLER,
    contract.PICTURE_LATENTS_UNARY: contract.SAMPLER_UNARY,
    contract.PICTURE_MESH: contract.MESH,
    contract.PICTURE_MESH_UNARY: contract.MESH_UNARY,
}
IMAGE_MODELS = (contract.PREPROCESS, contract.CONDITIONER, *LAST_STEPS)


def image_config_files(image_size: int = 518) -> dict[str, str]:
    return config_files(ConditionerServing(image_size))


def parsed(image_size: int = 518) -> dict[str, pb.ModelConfig]:
    return {path: text_format.Parse(text, pb.ModelConfig()) for path, text in image_config_files(image_size).items()}


def test_the_files_in_git_are_the_rendered_ones(root: Path) -> None:
    repository = root / "model_repository"
    for name, text in image_config_files().items():
        assert (repository / name).read_text() == text, f"{name}: run python -m hunyuan3d_export.networks"
    ours = {str(path.relative_to(repository)) for model in IMAGE_MODELS for path in (repository / model).rglob("*.pbtxt")}
    assert ours == set(image_config_files())
    for ensemble in LAST_STEPS:
        assert (repository / ensemble / "1").is_dir(), "Triton wants a version even of an ensemble"


@pytest.mark.parametrize("image_size", [518, 1022])
def test_tensors_are_the_contracts(image_size: int) -> None:
    for path, config in parsed(image_size).items():
        spec = contract.MODELS[Path(path).parts[0]]
        assert config.name == spec.name and (config.max_batch_size > 0) == (spec.name == contract.CONDITIONER)
        for found, wanted in ((config.input, spec.inputs), (config.output, spec.outputs)):
            assert [tensor.name for tensor in found] == [tensor.name for tensor in wanted]
            for tensor, described in zip(found, wanted, strict=True):
                dims = [image_size if dim == "side" else -1 if isinstance(dim, str) else dim for dim in described.dims]
                assert list(tensor.dims) == (dims[1:] if config.max_batch_size else dims), (path, tensor.name)
        assert [tensor.optional for tensor in config.input] == [tensor.optional for tensor in spec.inputs]


def test_the_encoder_batches_and_warms_up_at_its_size() -> None:
    configs = parsed(1022)
    for name, file in (
        ("config.pbtxt", "model.plan"),
        ("configs/cpu.pbtxt", "model.onnx"),
        ("configs/onnxruntime.pbtxt", "model.onnx"),
        ("configs/rtx.pbtxt", "model.rtx.plan"),
    ):
        config = configs[f"{contract.CONDITIONER}/{name}"]
        assert artifact_file(config) == file and config.max_batch_size == contract.AXES["B"].max
        assert list(config.model_warmup[0].inputs["pixels"].dims) == [1, 3, 1022, 1022]
    cpu = configs[f"{contract.CONDITIONER}/configs/cpu.pbtxt"].parameters
    texts = {key: value.string_value for key, value in cpu.items()}
    served, rest = parameters.split(batching.Options, texts)
    assert served.model_file == "model.onnx" and parameters.parse(onnx_graph.Options, rest).threads == 0


@pytest.mark.parametrize("name", LAST_STEPS)
def test_ensembles_join_their_steps_by_name(name: str) -> None:
    config = parsed()[f"{name}/config.pbtxt"]
    assert (config.platform, config.backend) == ("ensemble", "")
    known = {tensor.name for tensor in config.input}
    for step in config.ensemble_scheduling.step:
        spec = contract.MODELS[step.model_name]
        assert dict(step.input_map) == {key: key for key in step.input_map} and dict(step.output_map) == {
            key: key for key in step.output_map
        }
        assert set(step.input_map) <= known and not set(step.output_map) & known
        assert {tensor.name for tensor in spec.inputs if not tensor.optional} <= set(step.input_map)
        known |= set(step.output_map)
    assert {tensor.name for tensor in config.output} <= known
    *_, last = config.ensemble_scheduling.step
    assert last.model_name == LAST_STEPS[name]
    facts = {spec.name for spec in contract.PICTURE_FACTS}
    streams = contract.MODELS[last.model_name].name in (contract.SAMPLER, contract.MESH)
    wanted = set(last.output_map) | (set() if streams else facts)
    assert {tensor.name for tensor in config.output} == wanted, "see the contract: Triton wants all of a stream from one step"
    asked = {output for step in config.ensemble_scheduling.step for output in step.output_map}
    assert contract.VAE_LATENTS not in asked, "an ensemble would have it computed at every request"


def test_names_in_the_models_code_are_the_contracts(root: Path) -> None:
    preprocess = (root / "model_repository" / contract.PREPROCESS / "1" / "model.py").read_text()
    assert f'CONDITIONER = "{contract.CONDITIONER}"' in preprocess
    remover = (root / "model_repository" / contract.PREPROCESS / "1" / "remover.py").read_text()
    assert f'BACKGROUND = "{contract.BACKGROUND}"' in remover
    assert ", ".join(f'"{fate}"' for fate in contract.BACKGROUNDS) in preprocess
    for sampler in (contract.SAMPLER, contract.SAMPLER_UNARY):
        assert 'VAE_LATENTS = "vae_latents"' in (root / "model_repository" / sampler / "1" / "model.py").read_text()
    assert "vae_latents" in [tensor.name for tensor in contract.SAMPLER_OUTPUTS]
