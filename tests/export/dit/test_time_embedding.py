"""The frequencies of the time embedding keep their bits through casts, copies, loading, exporting and compiling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.dit import DiTConfig, Hunyuan3DDiT, random_model
from hunyuan3d_export.dit.layers import sinusoid_frequencies

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
CASTS: dict[str, Callable[[Hunyuan3DDiT], Hunyuan3DDiT]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "copy": copy.deepcopy,
    "copy of a half": lambda model: copy.deepcopy(model.half()),
    "meta and back": lambda model: model.to("meta").to_empty(device="cpu"),
}


def frequencies_of(model: Hunyuan3DDiT) -> list[Tensor]:
    return [model.time_in.frequencies, model.guidance_in.frequencies]


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_or_copy_changes_them(cast: str, distilled: DiTConfig) -> None:
    for found in frequencies_of(CASTS[cast](random_model(distilled))):
        assert found.dtype == torch.float32 and torch.equal(found, sinusoid_frequencies())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_memory_has_them_before_its_weights_are_loaded(
    dtype: torch.dtype, distilled: DiTConfig, draw: Draw
) -> None:
    weights = random_model(distilled, dtype=dtype)
    with torch.device("meta"):
        model = Hunyuan3DDiT(distilled).to(dtype)
    model.load_state_dict(weights.state_dict(), strict=True, assign=True)
    for found in frequencies_of(model):
        assert torch.equal(found, sinusoid_frequencies())
    inputs = (*draw(distilled, 2, 9, 5), torch.tensor([5.0, 1.5]))
    assert torch.equal(model(*inputs), weights(*inputs))


def test_they_move_with_the_weights(distilled: DiTConfig) -> None:
    model = random_model(distilled).to("meta")
    assert all(found.is_meta for found in frequencies_of(model))


def test_the_default_device_does_not_decide_where_they_are_computed() -> None:
    with torch.device("meta"):
        assert sinusoid_frequencies().device.type == "cpu"


def test_state_dicts_do_not_hold_them(distilled: DiTConfig) -> None:
    assert not [key for key in random_model(distilled).state_dict() if "frequencies" in key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_exported_graph_holds_them_and_computes_none(dtype: torch.dtype, narrow: DiTConfig, draw: Draw) -> None:
    program = torch.export.export(random_model(narrow, dtype=dtype), draw(narrow, 2, 9, 5))
    assert torch.equal(program.constants["time_in.frequencies"], sinusoid_frequencies())
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.cos.default" in targets and "aten.exp.default" not in targets


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # a warning of torch's own import
def test_a_compiled_graph_takes_them_from_the_model(narrow: DiTConfig, draw: Draw) -> None:
    """A graph that made the frequencies itself would copy them from host memory, which no CUDA graph can do."""
    model, taken, made = random_model(narrow), set(), []

    def keep(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        taken.update(value.data_ptr() for value in inputs if isinstance(value, Tensor))
        made.extend(node for node in graph.graph.nodes if node.target in (torch.tensor, torch.arange, torch.exp))
        return graph.forward

    inputs = draw(narrow, 2, 9, 5)
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    assert torch.equal(compiled(*inputs), model(*inputs))
    assert model.time_in.frequencies.data_ptr() in taken and not made
