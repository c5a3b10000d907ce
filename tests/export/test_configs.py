"""Every config.pbtxt in git is the text that configs.py renders, and the rendered tensors are those of the contract."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract
from hunyuan3d_export import pbtxt
from hunyuan3d_export.dit import PRESETS
from hunyuan3d_export.dit.configs import config_files
from hunyuan3d_export.dit.sizes import plan_profile
from hunyuan3d_export.networks import NETWORKS
from hunyuan3d_export.pbtxt import artifact_file, instances, read_config, write_configs

DISTILLED = [name for name, preset in PRESETS.items() if preset.config.guidance_embed]
SERVED = (contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY)


def parse_config(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


def parsed(preset: str) -> dict[str, pb.ModelConfig]:
    return {name: parse_config(text) for name, text in config_files(PRESETS[preset]).items()}


def spec_of(path: str, *, distilled: bool) -> contract.ModelSpec:
    model = Path(path).parts[0]
    return contract.denoiser(guidance_embed=distilled) if model == contract.DIT else contract.MODELS[model]


def test_the_files_in_git_are_the_rendered_ones(root: Path) -> None:
    repository = root / "model_repository"
    rendered = config_files(PRESETS["v2-0"])
    for name, text in rendered.items():
        assert (repository / name).read_text() == text, f"{name}: run python -m hunyuan3d_export.networks"
    ours = {str(path.relative_to(repository)) for model in SERVED for path in (repository / model).rglob("*.pbtxt")}
    assert ours == set(rendered)


@pytest.mark.parametrize("preset", ["v2-0", "v2-0-turbo"])
def test_tensors_are_the_contracts(preset: str) -> None:
    distilled = preset in DISTILLED
    for path, config in parsed(preset).items():
        spec = spec_of(path, distilled=distilled)
        batched = config.max_batch_size > 0
        assert config.name == spec.name == Path(path).parts[0]
        assert batched == (spec.name in (contract.DIT, contract.DIT_GUIDED))
        for found, wanted in ((config.input, spec.inputs), (config.output, spec.outputs)):
            assert [tensor.name for tensor in found] == [tensor.name for tensor in wanted]
            for tensor, described in zip(found, wanted, strict=True):
                dims = [-1 if isinstance(dim, str) else dim for dim in described.dims]
                dims = dims[1:] if batched else dims
                assert list(tensor.dims) == (dims or [1]), (path, tensor.name)
                assert tensor.HasField("reshape") == (not dims) and list(tensor.reshape.shape) == []
                name = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_")
                assert name == {"BYTES": "STRING"}.get(described.dtype, described.dtype)
        assert [tensor.optional for tensor in config.input] == [tensor.optional for tensor in spec.inputs]


@pytest.mark.parametrize("preset", ["v2-0", "v2-0-turbo", "v2-mv"])
def test_denoisers_batch_warm_up_and_bound_their_queue(preset: str) -> None:
    denoisers = {name: config for name, config in parsed(preset).items() if config.max_batch_size}
    assert len(denoisers) == (5 if preset in DISTILLED else 10)
    for path, config in denoisers.items():
        plan = path.endswith(("/config.pbtxt", "/rtx.pbtxt"))
        assert config.max_batch_size == (plan_profile(PRESETS[preset])["B"].max if plan else contract.AXES["B"].max)
        # Triton's preferred size is max_batch_size unless a config names another, so a delay would slow every smaller batch.
        assert not config.dynamic_batching.preferred_batch_size and not config.dynamic_batching.max_queue_delay_microseconds
        policy = config.dynamic_batching.default_queue_policy
        assert policy.max_queue_size > 0 and policy.default_timeout_microseconds > 0 and policy.allow_timeout_override
        assert policy.timeout_action == pb.ModelQueuePolicy.REJECT
        (warmup,) = config.model_warmup
        assert set(warmup.inputs) == {tensor.name for tensor in config.input}, path
        for tensor in config.input:
            sizes = list(warmup.inputs[tensor.name].dims)
            assert all(dim in (-1, size) for dim, size in zip(tensor.dims, sizes, strict=True))


def test_runtimes() -> None:
    configs = parsed("v2-0")
    for model in (contract.DIT, contract.DIT_GUIDED):
        plan = configs[f"{model}/config.pbtxt"]
        assert (plan.platform, artifact_file(plan)) == ("tensorrt_plan", "model.plan")
        assert not plan.HasField("optimization")  # no CUDA graphs (docs/engines.md), no accelerator that TensorRT 11 dropped
        cpu = configs[f"{model}/configs/cpu.pbtxt"]
        assert (cpu.backend, artifact_file(cpu)) == ("python", "model.onnx")
        native = configs[f"{model}/configs/onnxruntime.pbtxt"]
        assert (native.backend, artifact_file(native)) == ("onnxruntime", "model.onnx")
        rtx = configs[f"{model}/configs/rtx.pbtxt"]
        assert (rtx.backend, artifact_file(rtx)) == ("python", "model.rtx.plan")
        assert (rtx.instance_group[0].kind, rtx.instance_group[0].count) == (pb.ModelInstanceGroup.KIND_CPU, 1)
        torch = configs[f"{model}/configs/torch.pbtxt"]
        folder = "" if model == contract.DIT else "../../hunyuan3d_dit/1/"
        assert (torch.backend, artifact_file(torch)) == ("python", f"{folder}checkpoint.safetensors")
    assert artifact_file(configs[f"{contract.SAMPLER}/config.pbtxt"]) is None


def test_every_parameter_is_read_and_every_parameter_read_is_there() -> None:
    import batching
    import onnx_graph
    import rtx_plan
    import torch_network
    from parameters import parse, split
    from settings import Settings

    configs = parsed("v2-0")
    sampler = configs[f"{contract.SAMPLER}/config.pbtxt"]
    assert sampler.model_transaction_policy.decoupled
    assert parse(Settings, {key: value.string_value for key, value in sampler.parameters.items()}).steps == 50
    assert not configs[f"{contract.SAMPLER_UNARY}/config.pbtxt"].parameters
    runtimes = {"cpu": onnx_graph.Options, "rtx": rtx_plan.Options, "torch": torch_network.Options}
    files = {"onnxruntime": "model.onnx", "tensorrt_rtx": "model.rtx.plan", "torch": "checkpoint.safetensors"}
    for model, (name, options) in itertools.product((contract.DIT, contract.DIT_GUIDED), runtimes.items()):
        texts = {key: value.string_value for key, value in configs[f"{model}/configs/{name}.pbtxt"].parameters.items()}
        served, rest = split(batching.Options, texts)
        assert Path(served.model_file).name == files[served.runtime]
        assert batching.parse_limits(served.limits, [tensor.name for tensor in contract.MODELS[model].inputs])
        assert parse(options, rest)


@pytest.mark.parametrize("name", PRESETS)
def test_the_samplers_defaults_are_the_presets(name: str) -> None:
    from parameters import parse
    from settings import Settings

    preset = PRESETS[name]
    files = [
        f"{contract.SAMPLER}/{file}"
        for file in ("config.pbtxt", "configs/cpu.pbtxt", "configs/rtx.pbtxt", "configs/torch.pbtxt")
    ]
    texts = [{key: value.string_value for key, value in parsed(name)[file].parameters.items()} for file in files]
    settings, on_cpu, on_rtx, with_torch = (parse(Settings, parameters) for parameters in texts)
    all_rows = dataclasses.replace(settings, max_batch=contract.AXES["B"].max)
    assert on_rtx == dataclasses.replace(settings, restart_denoiser=True)
    assert on_cpu == with_torch == dataclasses.replace(all_rows, restart_denoiser=True) != settings
    assert settings.arrays == "numpy", "no GPU has yet shown CuPy to be faster"
    assert (settings.steps, settings.guidance_scale) == (preset.steps, preset.guidance_scale)
    assert (settings.schedule, settings.guidance_embed) == (preset.schedule, preset.config.guidance_embed)
    assert settings.max_batch == plan_profile(preset)["B"].max and on_cpu.max_batch == contract.AXES["B"].max


# Config -> why its code may get inputs in GPU memory. All other Python models read their inputs by as_numpy(), which fails there.
_TAKES_DEVICE_INPUTS = {
    f"{contract.DIT}/configs/torch.pbtxt": "torch_network.to_array takes a tensor by DLPack on whatever device it is",
    f"{contract.DIT_GUIDED}/configs/torch.pbtxt": "it is served by the same code",
    f"{contract.VAE}/configs/torch.pbtxt": "it is served by the same code",
    f"{contract.FIELD}/configs/torch.pbtxt": "it is served by the same code",
}


def all_configs() -> dict[str, pb.ModelConfig]:
    files = {path: text for network in NETWORKS.values() for path, text in network.configs(network.base).items()}
    return {path: parse_config(text) for path, text in files.items()}


def test_only_code_that_handles_device_inputs_gets_them() -> None:
    import torch_network

    configs = all_configs()
    found = {path for path, config in configs.items() if "FORCE_CPU_ONLY_INPUT_TENSORS" in config.parameters}
    assert found == set(_TAKES_DEVICE_INPUTS)
    for path in found:
        assert configs[path].parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
        assert configs[path].parameters["runtime"].string_value == "torch"
    tensor = torch.arange(3.0)
    on_device = SimpleNamespace(to_dlpack=lambda: torch.utils.dlpack.to_dlpack(tensor))  # has no as_numpy
    assert torch.equal(torch_network.to_array(on_device), tensor)


def test_a_plan_runs_on_one_gpu_and_lanes_follow_the_instances() -> None:
    """Without a list of GPUs, Triton makes an instance on each of them, while one lane keeps only one busy."""
    configs = all_configs()
    groups = {path: group for path, config in configs.items() for group in config.instance_group}
    assert {group.kind for group in groups.values()} >= {pb.ModelInstanceGroup.KIND_GPU, pb.ModelInstanceGroup.KIND_AUTO}
    for path, group in groups.items():
        # KIND_AUTO becomes KIND_CPU on a machine without a GPU, and Triton refuses a KIND_CPU that names GPUs.
        assert list(group.gpus) == ([0] if group.kind == pb.ModelInstanceGroup.KIND_GPU else []), path
    for name in ("config.pbtxt", "configs/cpu.pbtxt", "configs/torch.pbtxt"):
        lanes = int(configs[f"{contract.SAMPLER}/{name}"].parameters["lanes"].string_value)
        assert lanes == instances(configs[f"{contract.DIT}/{name}"]) == instances(configs[f"{contract.DIT_GUIDED}/{name}"])


def test_more_gpus_give_the_sampler_more_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pbtxt, "_GPUS", (0, 2, 3))
    configs = parsed("v2-0")
    assert list(configs[f"{contract.DIT_GUIDED}/config.pbtxt"].instance_group[0].gpus) == [0, 2, 3]
    assert configs[f"{contract.SAMPLER}/config.pbtxt"].parameters["lanes"].string_value == "3"
    assert configs[f"{contract.SAMPLER}/configs/cpu.pbtxt"].parameters["lanes"].string_value == "1"


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_presets_have_no_guided_model(name: str) -> None:
    configs = parsed(name)
    assert not [path for path in configs if path.startswith(contract.DIT_GUIDED)]
    assert "guidance" in [tensor.name for tensor in configs[f"{contract.DIT}/config.pbtxt"].input]


def test_a_named_config_replaces_the_default_one(tmp_path: Path) -> None:
    write_configs(tmp_path, config_files(PRESETS["v2-0"]))
    assert read_config(tmp_path / contract.DIT, "cpu").backend == "python"
    assert read_config(tmp_path / contract.DIT, "no-such-name").platform == "tensorrt_plan"
    assert read_config(tmp_path / contract.SAMPLER, "cpu").backend == "python"
    (tmp_path / contract.DIT / "configs" / "cpu.pbtxt").write_text("name: [")
    with pytest.raises(ValueError, match="cpu.pbtxt must be a Triton model config, got: "):
        read_config(tmp_path / contract.DIT, "cpu")


def test_written_files_are_the_rendered_ones(tmp_path: Path) -> None:
    write_configs(tmp_path, config_files(PRESETS["v2-mini-turbo"]))
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.pbtxt")}
    assert written == config_files(PRESETS["v2-mini-turbo"])


def test_names_in_the_models_code_are_the_contracts(root: Path) -> None:
    """The Python models cannot import the contract, so the few names that they repeat are compared in their source text."""
    code = root / "model_repository" / contract.SAMPLER / "1"
    assert f'PLAIN, GUIDED = "{contract.DIT}", "{contract.DIT_GUIDED}"' in (code / "denoisers.py").read_text()
    streaming = (code / "streaming.py").read_text()
    unary = (root / "model_repository" / contract.SAMPLER_UNARY / "1" / "model.py").read_text()
    assert '_SUFFIX = "_unary"' in unary
    for streamed, single in ((contract.SAMPLER, contract.SAMPLER_UNARY), (contract.MESH, contract.MESH_UNARY)):
        assert single == f"{streamed}_unary"
    switch = f'ERRORS_AS_OUTPUTS = "{contract.ERRORS_AS_OUTPUTS}"'
    assert switch in streaming and "from streaming import ERROR, ERRORS_AS_OUTPUTS" in unary
