"""The Python runtimes against torch, and all their parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graph
import parameters
import pytest
import torch
import torch_network

from hunyuan3d_export.attention import BACKENDS
from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.dit import Hunyuan3DDiT
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.dit.network import TOLERANCES, example_inputs
from hunyuan3d_export.dit.served import form_on

InTorch = Callable[..., torch_network.Network]
SIZES = (2, 33, 19)
OUTPUTS = ["velocity"]
PLAIN = {"network": "dit", "graph": "plain"}


@pytest.fixture
def threads() -> Any:
    """Restores the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model_of(denoiser: torch_network.Network) -> Any:
    """The Hunyuan3DDiT behind a graph."""
    return getattr(denoiser.module, "model", denoiser.module)


def test_a_graph_that_the_network_lacks(in_torch: InTorch) -> None:
    with pytest.raises(ValueError, match="graph must be one of plain, guided, got 'field'"):
        in_torch(graph="field")


def inputs(guided: bool) -> dict[str, torch.Tensor]:
    scale = {"guidance_scale": torch.tensor([1.5, 4.0])} if guided else {}
    return {**example_inputs(SIZES), **scale}


def expected(micro: Any, guided: bool) -> torch.Tensor:
    model = micro.load(torch.float32)
    return (model.guided if guided else model)(**inputs(guided))


def test_both_runtimes_give_the_guided_velocity(evaluate: Callable[..., list], micro: Any) -> None:
    tensors = {name: value.numpy() for name, value in inputs(True).items()}
    (found,) = evaluate([tensors])
    assert relative_l2(torch.from_numpy(found), expected(micro, True)) <= TOLERANCES["fp32"].evaluation


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("backend", sorted({"auto", *BACKENDS} - {"sage"}))
def test_attention_backends(backend: str, guided: bool, in_torch: InTorch, micro: Any) -> None:
    denoiser = in_torch(f"attention_backend={backend}", graph="guided" if guided else "plain")
    assert model_of(denoiser).attention_backend == ("sdpa" if backend == "auto" else backend)
    found = denoiser.run(inputs(guided))["velocity"]
    assert relative_l2(found, expected(micro, guided)) <= TOLERANCES["fp32"].evaluation


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", TOLERANCES["fp16"].evaluation), ("bf16", 5e-2)])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_dtypes(dtype: str, tolerance: float, guided: bool, in_torch: InTorch, micro: Any) -> None:
    denoiser = in_torch(f"dtype={dtype}", graph="guided" if guided else "plain")
    found = denoiser.run(inputs(guided))["velocity"]
    assert model_of(denoiser).dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype] and found.dtype == torch.float32
    assert 1e-5 < relative_l2(found, expected(micro, guided)) <= tolerance


@pytest.mark.parametrize("form", ["auto", "bias", "repeat"])
def test_guided_forms(form: str, in_torch: InTorch, micro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = Hunyuan3DDiT._null_branch
    monkeypatch.setattr(
        Hunyuan3DDiT,
        "_null_branch",
        lambda self, *sizes: asked.append(sizes[2] or self.arithmetic.guided_form) or whole(self, *sizes),
    )
    found = in_torch(f"guided_form={form}").run(inputs(True))["velocity"]
    assert asked == ["bias" if form == "auto" else form]
    assert relative_l2(found, expected(micro, True)) <= TOLERANCES["fp32"].evaluation


def test_the_form_that_auto_takes() -> None:
    assert (
        torch_parameters()["choices"] == "guided_form=auto" and torch_parameters(["guided_form=bias"])["choices"][12:] == "bias"
    )
    assert form_on("auto", torch.device("cuda:1")) == "repeat" and form_on("auto", torch.device("cpu")) == "bias"
    assert form_on("bias", torch.device("cuda")) == "bias"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("guided_form=mask", "guided_form must be one of auto, bias, repeat, got 'mask'"),
        ("", "choices must be guided_form, got none"),
        ("guided_form=bias colour=red", "choices must be guided_form, got guided_form, colour"),
    ],
)
def test_choices_of_the_network_that_do_not_exist(choices: str, message: str, checkpoint: Path) -> None:
    texts = {"network": "dit", "graph": "guided", **torch_parameters(["device=cpu"]), "choices": choices}
    with pytest.raises(ValueError, match=message):
        torch_network.Network(checkpoint, parameters.parse(torch_network.Options, texts), OUTPUTS)


def test_distilled_weights_take_their_guidance(micro_distilled: Any, tmp_path: Path) -> None:
    from hunyuan3d_export.dit import save_checkpoint

    path = tmp_path / "checkpoint.safetensors"
    model = micro_distilled.load(torch.float32)
    save_checkpoint(model, path, dtype=torch.float32)
    texts = {**PLAIN, **torch_parameters(["device=cpu"])}
    denoiser = torch_network.Network(path, parameters.parse(torch_network.Options, texts), OUTPUTS)
    tensors = {**example_inputs(SIZES), "guidance": torch.tensor([1.5, 4.0])}
    assert relative_l2(denoiser.run(tensors)["velocity"], model(**tensors)) <= TOLERANCES["fp32"].evaluation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # a warning of torch's own import
def test_compiled(in_torch: InTorch, micro: Any) -> None:
    denoiser, model = in_torch("compile=true"), micro.load(torch.float32)
    torch._dynamo.utils.counters.clear()
    for sizes in (SIZES, (1, 40, 7), (3, 9, 11)):
        tensors = example_inputs(sizes) | {"guidance_scale": torch.linspace(1, 4, sizes[0])}
        expected = model.guided(**tensors)
        assert relative_l2(denoiser.run(tensors)["velocity"], expected) <= TOLERANCES["fp32"].evaluation
    counted = torch._dynamo.utils.counters
    assert not counted["graph_break"], "CUDA graphs need the whole evaluation in one"
    assert 1 <= counted["stats"]["unique_graphs"] <= 2, "sizes must stay free; a batch of one is a graph of its own"


@pytest.mark.usefixtures("threads")
def test_threads(in_torch: InTorch) -> None:
    in_torch("threads=1")
    assert torch.get_num_threads() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("text", "expected"), [("threads=0", 1), ("threads=2", 2)])
def test_threads_of_a_model_on_a_gpu(text: str, expected: int, in_torch: InTorch) -> None:
    in_torch("device=cuda", text)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cuda_graphs=true"], "cuda_graphs must be false on cpu, got true\nhint: they need an NVIDIA GPU"),
        (["device=cuda:7"], r"device must be on this machine, got cuda:7 of \d GPUs"),
    ],
)
def test_options_that_this_machine_cannot_take(texts: list[str], message: str, in_torch: InTorch) -> None:
    with pytest.raises(ValueError, match=message):
        in_torch(*texts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch records an empty one first, and does not let it be heard
@pytest.mark.parametrize("texts", [["dtype=fp16"], ["dtype=bf16", "compile=true"], ["dtype=fp16", "cuda_graphs=true"]], ids=str)
def test_on_a_gpu(texts: list[str], in_torch: InTorch, micro: Any) -> None:
    denoiser = in_torch("device=cuda", *texts)
    first, again = (denoiser.run(inputs(True))["velocity"] for _ in range(2))
    assert first.device.type == "cuda" and torch.equal(first, again)
    assert relative_l2(first.cpu(), expected(micro, True)) <= 5e-2


def test_the_parameters_that_deploy_writes_are_those_that_are_read() -> None:
    options = parameters.parse(torch_network.Options, {**PLAIN, **torch_parameters()})
    assert (options.device, options.dtype, options.attention_backend) == ("auto", "auto", "auto")
    assert (options.compile, options.cuda_graphs, options.threads) == (False, False, 0)
    assert options.torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
        ({"threads": "two"}, "threads must be an integer, got 'two'"),
        ({"threads": "-1"}, "threads must be at least 0, got -1"),
        ({"network": "../dit"}, "network must be a folder of hunyuan3d_export, got '../dit'"),
        ({"dtype": "fp8"}, "dtype must be one of auto, fp32, fp16, bf16, got 'fp8'"),
        ({"colour": "red"}, "parameters must be network, graph, device, dtype, .*, got .*colour"),
    ],
)
def test_wrong_parameters(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameters.parse(torch_network.Options, {**PLAIN, **torch_parameters(), **changes})


def test_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'abacus'"):
        parameters.parse(torch_network.Options, {**PLAIN, **torch_parameters(), "device": "abacus"}).torch_device()


@pytest.fixture
def two_outputs(tmp_path: Path) -> Path:
    """A graph with outputs k = x scale and v = -x, unlike any network of this project."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        two (float[B, L, 3] x, float[B] scale) => (float[B, L, 3] k, float[B, L, 3] v)
        {
            axes = Constant <value_ints: ints = [1, 2]> ()
            column = Unsqueeze (scale, axes)
            k = Mul (x, column)
            v = Neg (x)
        }
    """)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_graph_has_any_number_of_outputs(two_outputs: Path) -> None:
    network = onnx_graph.Network(two_outputs, onnx_graph.Options(threads=1), ["v", "k"])
    x, scale = np.arange(12, dtype=np.float32).reshape(2, 2, 3), np.array([2, 3], np.float32)
    found = network.run({"x": x, "scale": scale})
    np.testing.assert_array_equal(found["k"], x * scale[:, None, None])
    np.testing.assert_array_equal(found["v"], -x)
    assert list(found) == ["v", "k"] and network.fixed_sizes == {"x": {2: 3}, "scale": {}}


def test_an_output_that_the_graph_lacks(two_outputs: Path) -> None:
    with pytest.raises(ValueError, match="graph must have the config's outputs k, velocity, got k, v"):
        onnx_graph.Network(two_outputs, onnx_graph.Options(threads=1), ["k", "velocity"])


def test_nothing_deployed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="graph must be deployed, found none at .*\nhint: hunyuan3d-export deploy"):
        onnx_graph.Network(tmp_path / "model.onnx", onnx_graph.Options(threads=0), OUTPUTS)
    options = parameters.parse(torch_network.Options, {**PLAIN, **torch_parameters()})
    with pytest.raises(FileNotFoundError, match="checkpoint must be deployed, found none at .*\nhint: hunyuan3d-export deploy"):
        torch_network.Network(tmp_path / "checkpoint.safetensors", options, OUTPUTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype=fp8", "torch option dtype must be auto|fp32|fp16|bf16, got 'fp8'"),
        ("colour=red", "torch option must be one of device, dtype, .*, got 'colour'\nhint: --torch dtype=fp16"),
        ("compile", "torch option compile must be true|false, got ''"),
    ],
)
def test_wrong_options_of_deploy(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        torch_parameters([text])
