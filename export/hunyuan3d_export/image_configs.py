"""The config.pbtxt of everything in front of the sampler: preprocessing, the image encoder, and the ensembles."""

from __future__ import annotations

import dataclasses

from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract

from .configs import code_model, config_text, native_onnxruntime, python_onnxruntime, tensorrt

_DEFAULT_SIZE = 518


def image_config_files(image_size: int = _DEFAULT_SIZE) -> dict[str, str]:
    """Path inside the repository -> text, for an encoder of pictures of image_size pixels; the files in git are for 518."""
    models = {name: _sized(spec, image_size) for name, spec in contract.IMAGE_MODELS.items()}
    conditioner, warmup = models[contract.CONDITIONER], {"V": 1}
    to_context = [models[contract.PREPROCESS], conditioner]
    python = python_onnxruntime(conditioner, warmup)
    del python.parameters["runtime"]  # there is one
    samplers = {contract.ENSEMBLE: contract.SAMPLER, contract.ENSEMBLE_UNARY: contract.SAMPLER_UNARY}
    configs = {
        f"{contract.PREPROCESS}/config.pbtxt": code_model(models[contract.PREPROCESS]),
        f"{contract.CONDITIONER}/config.pbtxt": tensorrt(conditioner, warmup),
        f"{contract.CONDITIONER}/configs/cpu.pbtxt": python,
        f"{contract.CONDITIONER}/configs/onnxruntime.pbtxt": native_onnxruntime(conditioner, warmup),
        f"{contract.IMAGE_CONTEXT}/config.pbtxt": _ensemble(models[contract.IMAGE_CONTEXT], to_context),
    }
    for name, sampler in samplers.items():
        configs[f"{name}/config.pbtxt"] = _ensemble(models[name], [*to_context, contract.MODELS[sampler]])
    return {path: config_text(config) for path, config in configs.items()}


def _sized(spec: contract.ModelSpec, image_size: int) -> contract.ModelSpec:
    """The spec with the picture's side in place of its axis."""

    def sized(tensor: contract.TensorSpec) -> contract.TensorSpec:
        return dataclasses.replace(tensor, dims=tuple(image_size if dim == "P" else dim for dim in tensor.dims))

    return contract.ModelSpec(spec.name, tuple(map(sized, spec.inputs)), tuple(map(sized, spec.outputs)))


def _ensemble(spec: contract.ModelSpec, steps: list[contract.ModelSpec]) -> pb.ModelConfig:
    """Steps joined by equal names: a tensor has one name from the request to the response."""
    config = code_model(spec)
    config.ClearField("backend")
    config.ClearField("instance_group")
    config.platform = "ensemble"
    known = {tensor.name for tensor in spec.inputs}
    for step in steps:
        inputs = [tensor.name for tensor in step.inputs if tensor.name in known]
        outputs = [tensor.name for tensor in step.outputs]
        scheduled = config.ensemble_scheduling.step.add(model_name=step.name, model_version=-1)
        scheduled.input_map.update({name: name for name in inputs})
        scheduled.output_map.update({name: name for name in outputs})
        known |= set(outputs)
    return config
