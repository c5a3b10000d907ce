"""float32 in parts of a half-precision network, and the weights as graphs hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.dit import DiTConfig, layers, random_model
from hunyuan3d_export.dit.attention import attention
from hunyuan3d_export.dit.config import Arithmetic

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
RelativeError = Callable[[Tensor, Tensor], float]
HALVES = (torch.float16, torch.bfloat16)
PARTS = (
    Arithmetic(attention_accumulation="fp32"),
    Arithmetic(residual="fp32"),
    Arithmetic(attention_accumulation="fp32", residual="fp32"),
)


@pytest.fixture(scope="module")
def deep(tiny: DiTConfig) -> DiTConfig:
    """Enough blocks for the rounding of a half-precision residual stream to add up."""
    return dataclasses.replace(
        tiny, in_channels=8, context_in_dim=24, hidden_size=64, num_heads=1, depth=4, depth_single_blocks=8
    )


@pytest.mark.parametrize("arithmetic", PARTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_float32_parts_reduce_the_error(
    dtype: torch.dtype, arithmetic: Arithmetic, deep: DiTConfig, draw: Draw, relative_error: RelativeError
) -> None:
    """The root mean square error over several networks, because rounding makes a single one smaller or larger by chance."""
    errors: dict[str, list[float]] = {"native": [], "fp32": []}
    for seed in range(6):
        half, double = random_model(deep, seed, dtype=dtype), random_model(deep, seed, dtype=dtype).double()
        latents, t, context = draw(deep, 2, 33, 60 + seed)
        latents, context, scale = latents.to(dtype).float(), context.to(dtype).float(), torch.tensor([5.0, 2.0])
        expected = double.guided(latents.double(), t.double(), context.double(), scale.double())
        for name, chosen in {"native": Arithmetic(), "fp32": arithmetic}.items():
            half.arithmetic = chosen
            found = half.guided(latents, t, context, scale)
            assert found.dtype == torch.float32
            errors[name].append(relative_error(found, expected) ** 2)
    native, float32 = (sum(values) for values in errors.values())
    assert float32 != native
    assert float32 <= native * (0.75 if arithmetic.residual == "fp32" else 1.05)


@pytest.mark.parametrize("form", ["bias", "repeat"])
def test_which_tensors_are_float32(form: str, deep: DiTConfig, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[torch.dtype]] = {"attention": set(), "stream": set(), "bias": set()}

    def spy_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **options: object) -> Tensor:
        seen["attention"] |= {q.dtype, k.dtype, v.dtype}
        seen["bias"] |= set() if bias is None else {bias.dtype}
        return attention(q, k, v, bias, **options)

    def spy_norm(x: Tensor) -> Tensor:
        seen["stream"].add(x.dtype)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=layers.NORM_EPS)

    monkeypatch.setattr(layers, "attention", spy_attention)
    monkeypatch.setattr(layers, "layer_norm", spy_norm)
    model = random_model(deep, dtype=torch.float16)
    inputs = (*draw(deep, 1, 9, 12), torch.ones(1))
    for arithmetic in (Arithmetic(), *PARTS):
        for found in seen.values():
            found.clear()
        model.arithmetic = arithmetic
        model.guided(*inputs, form=form)
        of_attention = torch.float32 if arithmetic.attention_accumulation == "fp32" else torch.float16
        assert seen["attention"] == {of_attention}
        assert seen["bias"] == (set() if form == "repeat" else {of_attention})
        assert seen["stream"] == {torch.float32 if arithmetic.residual == "fp32" else torch.float16}


def test_float32_parts_change_no_wider_network(deep: DiTConfig, draw: Draw) -> None:
    for dtype in (torch.float32, torch.float64):
        model, inputs = random_model(deep, dtype=dtype), draw(deep, 2, 9, 5, dtype)
        expected = model(*inputs)
        model.arithmetic = PARTS[-1]
        assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("name", ["attention_accumulation", "residual"])
def test_unknown_precision_of_a_part(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of native, fp32, got 'fp64'"):
        Arithmetic(**{name: "fp64"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_as_graphs_hold_them(dtype: torch.dtype, narrow: DiTConfig, distilled: DiTConfig, draw: Draw) -> None:
    """The velocity and the state dict stay; the modulations' own weights are views of the joined one, not second copies."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for config in (narrow, distilled):
        model, inputs = random_model(config, dtype=dtype), draw(config, 2, 9, 5, dtype)
        scale = None if config is narrow else torch.tensor([5.0, 1.0])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model(*inputs, scale)
        model.prepare_for_graph()
        torch.testing.assert_close(model(*inputs, scale), expected, rtol=tolerance, atol=tolerance)
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
        joined = dict(model.named_buffers())["_joined.weight"]
        lin = model.double_blocks[1].txt_mod.lin.weight
        assert lin.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
        part = model.single_blocks[0].hidden_weight
        assert part.untyped_storage().data_ptr() == model.single_blocks[0].linear2.weight.untyped_storage().data_ptr()
