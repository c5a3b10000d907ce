"""The structure of the graphs: names, types, free axes, operators, and the precision of each part of the arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hunyuan3d_client import contract
from hunyuan3d_export.dit import PRESETS, random_model, save_checkpoint
from hunyuan3d_export.dit.network import example_inputs
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.files import ONNX_FILE
from hunyuan3d_export.onnx_from_torch import OPSET, OnnxOptions, export_onnx
from hunyuan3d_export.runners import OnnxRunner

ARTIFACTS = [
    {"precision": "fp32"},
    {"precision": "fp16"},
    {"precision": "bf16"},
    {"precision": "fp32", "attention": "decomposed"},
    {"precision": "fp32", "distilled": True},
    {"precision": "fp16", "distilled": True},
    {"precision": "fp16", "choices": "guided_form=repeat"},
    {"precision": "fp16", "choices": "attention_accumulation=fp32,residual=fp32"},
]
WEIGHT_TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
CONTRACT_TYPES = {"FP32": "FLOAT", "FP16": "FLOAT16"}


def graph_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/{ONNX_FILE}"))


def type_name(value: int) -> str:
    return onnx.TensorProto.DataType.Name(value)


def element_types(graph: onnx.GraphProto) -> dict[str, str]:
    """Element type of every tensor in the graph by name."""
    types = {item.name: type_name(item.data_type) for item in graph.initializer}
    for item in (*graph.input, *graph.value_info, *graph.output):
        types[item.name] = type_name(item.type.tensor_type.elem_type)
    return types


def ancestors(graph: onnx.GraphProto, node: onnx.NodeProto) -> set[str]:
    """The names of the node's inputs and of all tensors that these are computed from."""
    makers = {output: maker for maker in graph.node for output in maker.output}
    found: set[str] = set()
    waiting = list(node.input)
    while waiting:
        name = waiting.pop()
        if name and name not in found:
            found.add(name)
            waiting.extend(makers[name].input if name in makers else ())
    return found


@pytest.fixture(params=ARTIFACTS, ids=lambda options: "-".join(map(str, options.values())))
def exported(request: pytest.FixtureRequest, artifacts: Callable[..., Path]) -> tuple[dict, Path]:
    """The options and the folder of one export."""
    return request.param, artifacts(**request.param)


def test_every_graph_the_weights_have_is_whole(exported: tuple[dict, Path]) -> None:
    options, folder = exported
    names = [contract.DIT] if options.get("distilled") else [contract.DIT, contract.DIT_GUIDED]
    assert [path.parent.name for path in graph_paths(folder)] == names
    for path in graph_paths(folder):
        onnx.checker.check_model(str(path), full_check=True)
        opsets = {opset.domain: opset.version for opset in onnx.load(path, load_external_data=False).opset_import}
        assert opsets == {"": OPSET}, "operators outside the standard would not load everywhere"


def test_inputs_and_outputs_are_the_contracts(exported: tuple[dict, Path]) -> None:
    options, folder = exported
    for path in graph_paths(folder):
        guided = path.parent.name == contract.DIT_GUIDED
        spec = contract.denoiser(guided=guided, guidance_embed=options.get("distilled", False))
        graph = onnx.load(path, load_external_data=False).graph
        for found, wanted in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            described = [
                (
                    value.name,
                    type_name(value.type.tensor_type.elem_type),
                    tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
                )
                for value in found
            ]
            assert described == [(tensor.name, CONTRACT_TYPES[tensor.dtype], tensor.dims) for tensor in wanted]


def test_attention_form(exported: tuple[dict, Path]) -> None:
    options, folder = exported
    blocks = 2
    for path in graph_paths(folder):
        branches = 2 if path.parent.name == contract.DIT_GUIDED else 1
        operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
        decomposed = options.get("attention") == "decomposed"
        assert operators.count("Attention") == (0 if decomposed else blocks * branches)
        assert operators.count("Softmax") == (blocks * branches if decomposed else 0)
        assert operators.count("RMSNormalization") == 6 and operators.count("Gelu") == 3


def test_weights_are_stored_once_in_the_asked_precision(exported: tuple[dict, Path], request: pytest.FixtureRequest) -> None:
    options, folder = exported
    weights: Weights = request.getfixturevalue("micro_distilled" if options.get("distilled") else "micro")
    expected = sum(value.numel() for value in weights.load(dtype=None).state_dict().values())  # type: ignore[arg-type]
    for path in graph_paths(folder):
        initializers = onnx.load(path, load_external_data=False).graph.initializer
        wanted = WEIGHT_TYPES[options["precision"]]
        big = {item.name: item for item in initializers if np.prod(item.dims) > 128}
        assert {type_name(item.data_type) for item in big.values()} == {wanted}
        stored = sum(int(np.prod(item.dims)) for item in initializers if type_name(item.data_type) == wanted)
        assert expected <= stored <= expected + 300, "beside the weights only a few constants"
        size = path.with_name(f"{ONNX_FILE}.data").stat().st_size
        assert size < 1.02 * expected * {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}[wanted] + 4096


def test_sinusoids_are_float32_in_every_precision(exported: tuple[dict, Path]) -> None:
    options, folder = exported
    for path in graph_paths(folder):
        graph = onnx.load(path, load_external_data=False).graph
        types = element_types(graph)
        waves = [node for node in graph.node if node.op_type in ("Cos", "Sin")]
        assert len(waves) == (4 if options.get("distilled") else 2)
        sources = {name for node in waves for name in ancestors(graph, node)}
        assert {"t"} <= sources <= set(types)
        assert ("guidance" in sources) == bool(options.get("distilled"))
        assert {types[name] for name in sources} <= {"FLOAT", "INT64"}


def guided_graph(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / contract.DIT_GUIDED / ONNX_FILE, load_external_data=False).graph


def test_the_repeat_form_has_no_mask(artifacts: Callable[..., Path]) -> None:
    for precision, choices, masked in (("fp16", "", True), ("fp16", "guided_form=repeat", False)):
        graph = guided_graph(artifacts(precision=precision, choices=choices))
        attentions = [node for node in graph.node if node.op_type == "Attention"]
        with_mask = [node for node in attentions if len(node.input) > 3 and node.input[3]]
        assert len(attentions) == 4 and len(with_mask) == (2 if masked else 0)
        assert ("Log" in {node.op_type for node in graph.node}) == masked


def test_float32_attention_and_residual(artifacts: Callable[..., Path]) -> None:
    """Element types of the inputs of each operator; the values of weights stay float16 (see the test of stored weights)."""
    for choices, attention, residual in (
        ("", "FLOAT16", "FLOAT16"),
        ("attention_accumulation=fp32", "FLOAT", "FLOAT16"),
        ("residual=fp32", "FLOAT16", "FLOAT"),
        ("attention_accumulation=fp32,residual=fp32", "FLOAT", "FLOAT"),
    ):
        graph = guided_graph(artifacts(precision="fp16", choices=choices))
        types = element_types(graph)
        of = {
            operator: {types[name] for node in graph.node if node.op_type == operator for name in node.input if name}
            for operator in ("Attention", "LayerNormalization", "MatMul")
        }
        assert of["Attention"] == {attention}, choices
        assert {types[node.input[0]] for node in graph.node if node.op_type == "LayerNormalization"} == {residual}, choices
        assert of["MatMul"] == {"FLOAT16"}, choices


def test_the_graph_is_made_of_few_products(artifacts: Callable[..., Path]) -> None:
    """One product for all modulations, and no tensor as wide as attention and MLP together."""
    for name in (contract.DIT, contract.DIT_GUIDED):
        graph = onnx.load(artifacts() / name / ONNX_FILE, load_external_data=False).graph
        sizes = {item.name: tuple(item.dims) for item in graph.initializer}
        joined = [size for size in sizes.values() if set(size) == {128, (2 * 6 + 3 + 2) * 128}]
        assert len(joined) == 1, sizes
        assert not [size for size in sizes.values() if set(size) == {128, 5 * 128}]


def test_null_token_biases_are_computed_in_float32(artifacts: Callable[..., Path]) -> None:
    copies = {"fp32": 1, "fp16": 2, "bf16": 3}
    for precision, count in copies.items():
        graph = onnx.load(artifacts(precision=precision) / contract.DIT_GUIDED / ONNX_FILE, load_external_data=False).graph
        types = element_types(graph)
        logarithms = [node for node in graph.node if node.op_type == "Log"]
        assert len(logarithms) == count
        assert {types[name] for node in logarithms for name in (*node.input, *node.output)} == {"FLOAT"}
        for node in logarithms:
            assert "context" in ancestors(graph, node), "T must come from the input's shape"


def test_bf16_stores_the_rounded_weights(artifacts: Callable[..., Path], micro: Weights) -> None:
    import torch

    state = micro.load(torch.bfloat16).state_dict()
    path = artifacts(precision="bf16") / contract.DIT / ONNX_FILE
    stored = {item.name: item for item in onnx.load(path).graph.initializer}
    compared = [name for name in state if name in stored]
    assert len(compared) >= len(state) // 2
    for name in compared:
        assert np.array_equal(numpy_helper.to_array(stored[name]).astype(np.float32), state[name].float().numpy()), name


@pytest.mark.parametrize(
    ("choices", "precision", "message"),
    [
        ({"form": "repeat"}, "fp32", "graph option must be one of guided_form, attention_accumulation, residual, got 'form'"),
        ({"guided_form": "mask"}, "fp32", "guided_form must be one of bias, repeat, got 'mask'"),
        ({"residual": "fp16"}, "fp16", "residual must be one of native, fp32, got 'fp16'"),
        ({"residual": "fp32"}, "fp32", "residual must be native in an fp32 graph, got fp32\nhint: --precision fp16"),
        ({"guided_form": "bias"}, "fp16", "guided_form must be left out where it changes no graph, got bias for plain"),
    ],
)
def test_a_networks_own_option_is_checked(
    choices: dict[str, str], precision: str, message: str, micro: Weights, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(micro, tmp_path, graph="plain", options=OnnxOptions(precision=precision, choices=choices))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"precision": "fp8"}, {"attention": "flash"}])
def test_unknown_option_is_refused(option: dict[str, str]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{option[name]}'"):
        OnnxOptions(**option)


def test_unknown_graph_is_refused(micro: Weights, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph must be one of plain, guided, all, got 'both'"):
        export_onnx(micro, tmp_path, graph="both")
    assert list(tmp_path.iterdir()) == []


def test_distilled_weights_have_no_guided_graph(micro_distilled: Weights, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph must be plain for guidance-distilled weights"):
        export_onnx(micro_distilled, tmp_path, graph="guided")
    assert list(tmp_path.iterdir()) == []


def test_a_deep_network_loads(tmp_path: Path) -> None:
    """As many blocks as v2-mini has, narrow: their modulation is split in more parts than the exporter keeps in the graph by itself."""
    config = dataclasses.replace(PRESETS["tiny"].config, depth=8, depth_single_blocks=16)
    save_checkpoint(random_model(config), tmp_path / "deep.safetensors")
    source = Weights(checkpoint=tmp_path / "deep.safetensors")
    (folder,) = export_onnx(source, tmp_path / "onnx", graph="plain", options=OnnxOptions(precision="fp32"))
    graph = onnx.load(folder / ONNX_FILE, load_external_data=False).graph
    outside = [np.prod(tensor.dims) for tensor in graph.initializer if tensor.external_data]
    assert outside and min(outside) >= 1024 and max(len(node.output) for node in graph.node if node.op_type == "Split") > 32
    OnnxRunner(tmp_path / "onnx").run(contract.DIT, example_inputs((1, 5, 3)))
