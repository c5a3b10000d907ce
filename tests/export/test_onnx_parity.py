"""ONNX Runtime computes the same velocities as torch, at shapes that the exporter never saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hunyuan3d_client import contract
from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.dit import Hunyuan3DDiT
from hunyuan3d_export.dit.config import GUIDED_FORMS
from hunyuan3d_export.dit.network import TOLERANCES, example_inputs
from hunyuan3d_export.dit.reference_sampler import OnnxDenoiser
from hunyuan3d_export.dit.weights import Weights

# (B, L, T). No L and no T is that of the example that was traced, (2, 24, 37).
SIZES = [(1, 3, 2), (3, 1, 5), (2, 7, 1), (4, 1, 1), (5, 129, 64), (3, 40, 1370), (8, 2, 3)]
# Precision, form of attention, the network's own options.
GRAPHS = [
    ("fp32", "op", ""),
    ("fp32", "decomposed", ""),
    ("fp32", "op", "guided_form=repeat"),
    ("fp16", "op", ""),
    ("fp16", "decomposed", ""),
    ("fp16", "op", "guided_form=repeat"),
    ("fp16", "op", "attention_accumulation=fp32,residual=fp32"),
]


@pytest.fixture(scope="module")
def model(micro: Weights) -> Hunyuan3DDiT:
    return micro.load(torch.float32)


@pytest.fixture(scope="module")
def distilled_model(micro_distilled: Weights) -> Hunyuan3DDiT:
    return micro_distilled.load(torch.float32)


@pytest.fixture(scope="module", params=GRAPHS, ids=lambda form: "-".join(filter(None, form)))
def graphs(request: pytest.FixtureRequest, artifacts: Callable[..., Path]) -> tuple[OnnxDenoiser, float]:
    """ONNX Runtime on the plain and guided graphs of one precision and form, and the error allowed."""
    precision, attention, choices = request.param
    folder = artifacts(precision=precision, attention=attention, choices=choices)
    return OnnxDenoiser(folder), TOLERANCES[precision].evaluation


@pytest.fixture(scope="module")
def exact(artifacts: Callable[..., Path]) -> OnnxDenoiser:
    return OnnxDenoiser(artifacts())


def two_batch(denoiser: OnnxDenoiser | Hunyuan3DDiT, inputs: dict[str, Tensor], scale: Tensor) -> Tensor:
    """Guidance as upstream runs it: each sample is evaluated twice, once with a context of zeros."""
    context = inputs["context"]
    both = denoiser(inputs["latents"].repeat(2, 1, 1), inputs["t"].repeat(2), torch.cat([context, torch.zeros_like(context)]))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale[:, None, None] * (conditional - unconditional)


def scales(batch: int) -> Tensor:
    return torch.tensor([5.0, 0.0, 1.0, -1.75, 7.5, 2.25, 1.5, 0.5])[:batch]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plain(sizes: tuple[int, int, int], graphs: tuple[OnnxDenoiser, float], model: Hunyuan3DDiT) -> None:
    denoiser, tolerance = graphs
    inputs = example_inputs(sizes)
    found = denoiser(**inputs)
    assert found.dtype == torch.float32 and found.shape == inputs["latents"].shape
    assert relative_l2(found, model(**inputs)) <= tolerance


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_guided(sizes: tuple[int, int, int], graphs: tuple[OnnxDenoiser, float], model: Hunyuan3DDiT) -> None:
    denoiser, tolerance = graphs
    inputs, scale = example_inputs(sizes), scales(sizes[0])
    assert relative_l2(denoiser.guided(**inputs, guidance_scale=scale), two_batch(model, inputs, scale)) <= tolerance


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # ONNX Runtime has no bf16 on a CPU
@pytest.mark.parametrize("sizes", SIZES[1:6], ids=str)
def test_distilled(
    sizes: tuple[int, int, int], precision: str, artifacts: Callable[..., Path], distilled_model: Hunyuan3DDiT
) -> None:
    denoiser = OnnxDenoiser(artifacts(precision=precision, distilled=True))
    inputs = {**example_inputs(sizes), "guidance": scales(sizes[0]).abs()}
    expected = distilled_model(**inputs)
    assert relative_l2(denoiser(**inputs), expected) <= TOLERANCES[precision].evaluation
    inputs["guidance"] = inputs["guidance"] + 1
    assert relative_l2(denoiser(**inputs), expected) > 10 * TOLERANCES[precision].evaluation, "guidance must matter"


@pytest.mark.parametrize("form", GUIDED_FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 257, 1370, 5480])
def test_guided_equals_two_batch_inside_onnx_runtime(tokens: int, form: str, artifacts: Callable[..., Path]) -> None:
    exact = OnnxDenoiser(artifacts(choices="" if form == "bias" else f"guided_form={form}"))
    inputs, scale = example_inputs((2, 9, tokens), seed=tokens), torch.tensor([5.0, -0.75])
    guided = exact.guided(**inputs, guidance_scale=scale)
    assert relative_l2(guided, two_batch(exact, inputs, scale)) <= 1e-5
    assert relative_l2(guided, exact(**inputs)) > 1e-2, "guidance must matter"


def test_each_sample_has_its_own_scale_and_time(exact: OnnxDenoiser) -> None:
    inputs = {name: value.expand(3, *value.shape[1:]) for name, value in example_inputs((1, 11, 6)).items()}
    inputs["t"] = torch.tensor([0.1, 0.9, 0.1])
    inputs = {name: value.contiguous() for name, value in inputs.items()}
    first, later, scaled = exact.guided(**inputs, guidance_scale=torch.tensor([2.0, 2.0, 3.0]))
    assert relative_l2(later, first) > 1e-2 and relative_l2(scaled, first) > 1e-2
    alone = {name: value[2:] for name, value in inputs.items()}
    assert relative_l2(exact.guided(**alone, guidance_scale=torch.tensor([3.0]))[0], scaled) <= 1e-6


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 8), latents=st.integers(1, 90), tokens=st.integers(1, 200), seed=st.integers(0, 2**20))
def test_any_shape(batch: int, latents: int, tokens: int, seed: int, exact: OnnxDenoiser, model: Hunyuan3DDiT) -> None:
    inputs, scale = example_inputs((batch, latents, tokens), seed=seed), scales(batch)
    assert relative_l2(exact(**inputs), model(**inputs)) <= 1e-5
    assert relative_l2(exact.guided(**inputs, guidance_scale=scale), model.guided(**inputs, guidance_scale=scale)) <= 1e-5


@pytest.mark.parametrize("part", ["attention_accumulation", "residual"])
def test_float32_parts_of_a_half_precision_graph_are_no_less_exact(
    part: str, model: Hunyuan3DDiT, artifacts: Callable[..., Path]
) -> None:
    """Squared errors against float32 torch, summed over several inputs; the graph with both parts in float32 is the best."""
    both = "attention_accumulation=fp32,residual=fp32"
    errors = {}
    for choices in ("", f"{part}=fp32", both):
        denoiser = OnnxDenoiser(artifacts(precision="fp16", choices=choices))
        errors[choices] = 0.0
        for seed in range(6):
            inputs, scale = example_inputs((2, 40, 90), seed=seed), scales(2)
            expected = model.guided(**inputs, guidance_scale=scale)
            errors[choices] += relative_l2(denoiser.guided(**inputs, guidance_scale=scale), expected) ** 2
    assert errors[f"{part}=fp32"] <= 1.05 * errors[""]
    assert errors[both] < errors[""]


@pytest.mark.parametrize("form", GUIDED_FORMS)
def test_guided_in_bfloat16(form: str, micro: Weights, model: Hunyuan3DDiT) -> None:
    """In torch, because ONNX Runtime has no bfloat16 on a CPU."""
    inputs, scale = example_inputs((2, 33, 130)), scales(2)
    found = micro.load(torch.bfloat16).guided(**inputs, guidance_scale=scale, form=form)
    assert relative_l2(found, two_batch(model, inputs, scale)) <= TOLERANCES["bf16"].evaluation


def test_the_checks_sizes_differ_from_each_other_and_from_the_export() -> None:
    from hunyuan3d_export.dit.network import CASES, EXAMPLE_SIZES

    assert all(len(set(sizes)) == 3 for sizes in CASES)
    assert set(EXAMPLE_SIZES) == set(contract.MODELS[contract.DIT].axes)
    for traced in (EXAMPLE_SIZES["L"], EXAMPLE_SIZES["T"]):
        assert traced not in {size for sizes in (*CASES, *SIZES) for size in sizes[1:]}
