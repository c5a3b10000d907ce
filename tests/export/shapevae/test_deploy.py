"""The decoder's deployment: alone or beside a denoiser, with configs that fit, and never with graphs of two precisions."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import batching
import onnx_graph
import parameters
import pytest
import torch
import torch_network
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hunyuan3d_client import contract
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.engine_from_onnx import build_engines
from hunyuan3d_export.engines.targets import find_target
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.networks import NETWORKS
from hunyuan3d_export.pbtxt import artifact_file
from hunyuan3d_export.repository_from_artifacts import SOURCE, DeployError, deploy, deploy_checkpoint
from hunyuan3d_export.server.embedded import loadable_models
from hunyuan3d_export.shapevae import PRESETS
from hunyuan3d_export.shapevae.configs import config_files
from hunyuan3d_export.shapevae.weights import ShapeVAESource

Export = Callable[..., Path]
MODELS = [contract.FIELD, contract.VAE]
SERVED = sorted([*MODELS, contract.MESH, contract.MESH_UNARY])


def parsed(preset: str = "v2-0", **changes: str) -> dict[str, pb.ModelConfig]:
    files = config_files(dataclasses.replace(PRESETS[preset], **changes))
    return {name: text_format.Parse(text, pb.ModelConfig()) for name, text in files.items()}


def test_the_files_in_git_are_the_rendered_ones(root: Path) -> None:
    repository = root / "model_repository"
    for name, text in config_files(PRESETS["v2-0"]).items():
        assert (repository / name).read_text() == text, f"{name}: run python -m hunyuan3d_export.networks"
    ours = {str(path.relative_to(repository)) for model in SERVED for path in (repository / model).rglob("*.pbtxt")}
    assert ours == set(config_files(PRESETS["v2-0"]))


@pytest.mark.parametrize(
    ("preset", "keys_values", "heads"), [("v2-0", "FP16", 16), ("v2-0-turbo", "FP16", 8), ("tiny", "FP32", 2)]
)
def test_tensors_are_the_contracts(preset: str, keys_values: str, heads: int) -> None:
    for path, config in parsed(preset, keys_values=keys_values).items():
        spec = contract.MODELS[Path(path).parts[0]].sized({"H": heads})
        if spec.name not in MODELS:  # code, not a network
            continue
        assert config.name == spec.name and config.max_batch_size == contract.AXES["B"].max
        for found, wanted in ((config.input, spec.inputs), (config.output, spec.outputs)):
            for tensor, described in zip(found, wanted, strict=True):
                dims = [-1 if isinstance(dim, str) else dim for dim in described.dims[1:]]
                dtype = keys_values if described.name in ("k", "v") else described.dtype
                assert (tensor.name, list(tensor.dims)) == (described.name, dims)
                assert pb.DataType.Name(tensor.data_type) == f"TYPE_{dtype}"


def test_runtimes_and_parameters() -> None:
    configs = parsed()
    for graph, model in (("vae", contract.VAE), ("field", contract.FIELD)):
        plan, native = configs[f"{model}/config.pbtxt"], configs[f"{model}/configs/onnxruntime.pbtxt"]
        assert (plan.platform, artifact_file(plan)) == ("tensorrt_plan", "model.plan")
        assert (native.backend, artifact_file(native)) == ("onnxruntime", "model.onnx")
        for name, options in (("cpu", onnx_graph.Options), ("torch", torch_network.Options)):
            texts = parameters.of_config(json_of(configs[f"{model}/configs/{name}.pbtxt"]))
            served, rest = parameters.split(batching.Options, texts)
            own = parameters.parse(options, rest)
            limits = batching.parse_limits(served.limits, ["queries", "k", "v", "latents"])
            assert [(limit.name, limit.axis, limit.high) for limit in limits] == [("queries", 1, 4096)] * (graph == "field")
            if name == "torch":
                assert (own.network, own.graph) == ("shapevae", graph)
    assert artifact_file(configs[f"{contract.FIELD}/configs/torch.pbtxt"]) == "../../hunyuan3d_vae/1/checkpoint.safetensors"
    warmup = configs[f"{contract.FIELD}/config.pbtxt"].model_warmup[0].inputs
    assert list(warmup["queries"].dims) == [contract.AXES["P"].opt, 3] and list(warmup["k"].dims) == [16, 3072, 64]


def json_of(config: pb.ModelConfig) -> dict[str, dict[str, dict[str, str]]]:
    return {"parameters": {key: {"string_value": value.string_value} for key, value in config.parameters.items()}}


def test_the_buckets_are_the_sizes_that_every_runtime_takes() -> None:
    assert (
        list(contract.POINT_BUCKETS) == sorted(contract.POINT_BUCKETS) and contract.AXES["P"].max == contract.POINT_BUCKETS[-1]
    )
    assert contract.AXES["P"].min == 1, "a caller that is alone need not pad"
    assert set(NETWORKS["vae"].plan_sizes(PRESETS["v2-0"])["P"]) == set(contract.POINT_BUCKETS)


def test_it_is_deployed_alone_and_beside_a_denoiser(artifacts: Export, exported: Export, tmp_path: Path) -> None:
    assert deploy(exported(), tmp_path / "alone") == MODELS
    assert loadable_models(tmp_path / "alone", "cpu") == SERVED
    deploy(artifacts(), tmp_path / "both")
    before = loadable_models(tmp_path / "both", "cpu")
    assert not set(MODELS) & set(before)
    deploy(exported(variant="turbo"), tmp_path / "both")
    assert loadable_models(tmp_path / "both", "cpu") == sorted([*before, *SERVED])
    config = (tmp_path / "both" / contract.FIELD / "config.pbtxt").read_text()
    assert "TYPE_FP32" in config and "TYPE_FP16" not in config
    deploy(artifacts(seed=1), tmp_path / "both")
    assert loadable_models(tmp_path / "both", "cpu") == sorted([*before, *SERVED]), "the decoder stays"
    assert (tmp_path / "both" / contract.FIELD / "config.pbtxt").read_text() == config
    code = {path.name for path in (tmp_path / "both" / contract.FIELD / "1").glob("*.py")}
    assert {"model.py", "batching.py", "onnx_graph.py", "torch_network.py"} <= code


def test_the_repository_in_git_takes_only_the_base_models_sizes(exported: Export) -> None:
    with pytest.raises(
        DeployError, match=r"must keep its configs, and the shape decoder of custom needs others \(.*\)\nhint: deploy"
    ):
        deploy(exported(precision="fp16"), SOURCE)


def test_graphs_of_two_precisions_are_refused(exported: Export, tmp_path: Path) -> None:
    """Their keys and values have two dtypes, so the models could not be called one after the other."""
    shutil.copytree(exported() / contract.VAE, tmp_path / "mixed" / contract.VAE)
    shutil.copytree(exported(precision="fp16") / contract.FIELD, tmp_path / "mixed" / contract.FIELD)
    with pytest.raises(
        DeployError, match="must be served with the same facts as .*\nhint: export them again, in one precision"
    ):
        deploy(tmp_path / "mixed", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_plan_must_take_every_bucket(exported: Export, tmp_path: Path) -> None:
    build_engines(exported(precision="fp16"), tmp_path / "plans", find_target("tensorrt-rtx", ("SM89",)))
    for model in MODELS:  # as the target tensorrt, which needs a GPU, would write it
        folder = tmp_path / "plans" / model
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["made_from"] |= {"target": "tensorrt", "library_version": "11.1.0"}
        (folder / "model.rtx.plan").rename(folder / "model.plan")
        manifest["files"] = {"model.plan": manifest["files"]["model.rtx.plan"]}
        if model == contract.FIELD:
            manifest["made_from"]["profile"]["P"] = [1, 256, 1024]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DeployError, match="hunyuan3d_field must take P from 256 to 4096, as its callers will ask, got 1 to 1024"
    ):
        deploy(tmp_path / "plans", tmp_path / "repository")


def test_the_checkpoint_is_deployed_for_the_torch_runtime(source: Callable[..., ShapeVAESource], tmp_path: Path) -> None:
    assert deploy_checkpoint(source("turbo"), tmp_path, precision="fp16") == [contract.VAE, contract.FIELD]
    assert loadable_models(tmp_path, "torch") == SERVED
    manifest = Manifest.read(tmp_path / contract.VAE / "1", hint="")
    manifest.check_files(tmp_path / contract.VAE / "1", hint="")
    assert manifest.serving["keys_values"] == "FP16" and manifest.serving["config"]["geo_decoder_downsample_ratio"] == 2
    before = (tmp_path / contract.VAE / "1" / "checkpoint.safetensors").stat().st_mtime_ns
    deploy_checkpoint(source("turbo"), tmp_path, precision="fp16")
    assert (tmp_path / contract.VAE / "1" / "checkpoint.safetensors").stat().st_mtime_ns == before


def test_the_facts_in_the_manifest_reach_the_torch_runtime(source: Callable[..., ShapeVAESource], tmp_path: Path) -> None:
    deploy_checkpoint(source(), tmp_path)
    folder = tmp_path / contract.VAE / "1"
    inputs = {"latents": torch.ones(1, 3, 64)}
    queries = {"queries": torch.full((1, 2, 3), 0.3)}

    def field() -> torch.Tensor:
        texts = {"network": "shapevae", **torch_parameters(["device=cpu"]), "choices": ""}
        options = [parameters.parse(torch_network.Options, {**texts, "graph": graph}) for graph in ("vae", "field")]
        outputs = (["k", "v"], ["field"])
        vae, field = (
            torch_network.Network(folder / "checkpoint.safetensors", each, names)
            for each, names in zip(options, outputs, strict=True)
        )
        shape = vae.run(inputs)
        assert shape["k"].dtype == torch.float32, "the checkpoint is stored in fp32"
        return field.run({**queries, **shape})["field"]

    expected = field()
    for fact, value in (("scale_factor", 1.25), ("include_pi", True)):
        manifest = json.loads((folder / "manifest.json").read_text())
        before, manifest["serving"][fact] = manifest["serving"][fact], value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert not torch.allclose(field(), expected, rtol=1e-3), fact
        manifest["serving"][fact] = before
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="must hold a manifest.json, found none\nhint: .*deploy the checkpoint again"):
        field()
