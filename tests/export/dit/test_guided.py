"""The guided evaluation equals the two-batch evaluation, and in half precision is no less exact than the plain graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hunyuan3d_export.dit import DiTConfig, Hunyuan3DDiT, layers, random_model
from hunyuan3d_export.dit import model as model_module
from hunyuan3d_export.dit.attention import attention
from hunyuan3d_export.dit.config import GUIDED_FORMS, Arithmetic
from hunyuan3d_export.dit.model import null_token_bias

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
RelativeError = Callable[[Tensor, Tensor], float]
CONFIG = DiTConfig(
    in_channels=6,
    context_in_dim=20,
    hidden_size=40,
    mlp_ratio=3.0,
    num_heads=5,
    depth=2,
    depth_single_blocks=2,
    guidance_embed=False,
)


def two_batch(model: Hunyuan3DDiT, latents: Tensor, t: Tensor, context: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance as upstream runs it: every sample twice, once with a context of zeros."""
    both = model(latents.repeat(2, 1, 1), t.repeat(2), torch.cat([context, torch.zeros_like(context)]))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale[:, None, None] * (conditional - unconditional)


@pytest.fixture(scope="module")
def exact() -> Hunyuan3DDiT:
    narrowest = dataclasses.replace(CONFIG, hidden_size=16, num_heads=1, depth=1)  # cheap at thousands of tokens
    return random_model(narrowest, seed=11, dtype=torch.float64)


@pytest.mark.parametrize("form", GUIDED_FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64, 257, 1370, 5480])
def test_equals_two_batch_in_float64(
    exact: Hunyuan3DDiT, tokens: int, form: str, draw: Draw, relative_error: RelativeError
) -> None:
    latents, t, context = draw(CONFIG, 3, 23, tokens, torch.float64)
    scale = torch.tensor([5.0, 0.0, -1.75], dtype=torch.float64)
    expected = two_batch(exact, latents, t, context, scale)
    assert relative_error(exact.guided(latents, t, context, scale, form=form), expected) <= 1e-12


@pytest.mark.parametrize("form", GUIDED_FORMS)
@pytest.mark.parametrize("shape", [(1, 37, 5), (2, 5, 1370), (3, 70, 1)])
def test_equals_two_batch_in_float32(
    shape: tuple[int, int, int], form: str, tiny: DiTConfig, draw: Draw, relative_error: RelativeError
) -> None:
    model = random_model(tiny, seed=11)
    latents, t, context = draw(tiny, *shape)
    scale = torch.linspace(1.5, 9.0, shape[0])
    expected = two_batch(model, latents, t, context, scale)
    assert relative_error(model.guided(latents, t, context, scale, form=form), expected) <= 1e-5


def test_repeat_gives_attention_no_bias_and_every_key(exact: Hunyuan3DDiT, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **options: object) -> Tensor:
        calls.append((q.shape[2], k.shape[2], v.shape[2], bias is not None))
        return attention(q, k, v, bias, **options)

    monkeypatch.setattr(layers, "attention", spy)
    inputs = (*draw(CONFIG, 1, 9, 12, torch.float64), torch.ones(1, dtype=torch.float64))
    exact.guided(*inputs, form="repeat")
    assert set(calls) == {(21, 21, 21, False), (10, 21, 21, False)}
    calls.clear()
    exact.guided(*inputs, form="bias")
    assert set(calls) == {(21, 21, 21, False), (10, 10, 10, True)}


def test_the_form_is_the_models_own_where_none_is_named(tiny: DiTConfig, draw: Draw) -> None:
    model = random_model(tiny, seed=11, dtype=torch.bfloat16)  # in bfloat16 the two forms round differently
    inputs = (*draw(tiny, 1, 9, 12), torch.full((1,), 5.0))
    bias, repeat = (model.guided(*inputs, form=form) for form in GUIDED_FORMS)
    assert torch.equal(model.guided(*inputs), bias) and not torch.equal(bias, repeat)
    model.arithmetic = Arithmetic(guided_form="repeat")
    assert torch.equal(model.guided(*inputs), repeat) and torch.equal(model.guided(*inputs, form="bias"), bias)
    for wrong in (lambda: model.guided(*inputs, form="mask"), lambda: Arithmetic(guided_form="mask")):
        with pytest.raises(ValueError, match="guided form must be one of bias, repeat, got 'mask'"):
            wrong()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 90)),
    scales=st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
    form=st.sampled_from(GUIDED_FORMS),
)
def test_equals_two_batch_for_any_shape_and_scales(
    shape: tuple[int, int, int], scales: list[float], seed: int, form: str
) -> None:
    batch, latent_tokens, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    model = random_model(dataclasses.replace(CONFIG, depth=1, depth_single_blocks=1), seed=seed, dtype=torch.float64)
    latents = torch.randn(batch, latent_tokens, 6, generator=generator, dtype=torch.float64)
    context = torch.randn(batch, tokens, 20, generator=generator, dtype=torch.float64)
    t, scale = torch.rand(batch, generator=generator, dtype=torch.float64), torch.tensor(scales[:batch], dtype=torch.float64)
    expected = two_batch(model, latents, t, context, scale)
    assert (model.guided(latents, t, context, scale, form=form) - expected).norm() <= 1e-10 * (1 + expected.norm())


def test_every_sample_has_its_own_scale(exact: Hunyuan3DDiT, draw: Draw) -> None:
    latents, t, context = draw(CONFIG, 1, 9, 12, torch.float64)
    same = (latents.repeat(3, 1, 1), t.repeat(3), context.repeat(3, 1, 1))
    zero, one, two = exact.guided(*same, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(one[None], exact(latents, t, context), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(zero[None], exact(latents, t, torch.zeros_like(context)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two, 2 * one - zero, rtol=1e-12, atol=1e-12)


def test_refuses_distilled_weights(distilled: DiTConfig, draw: Draw) -> None:
    latents, t, context = draw(distilled, 1, 4, 3)
    with pytest.raises(ValueError, match="must be called on a base model.*\nhint: call forward with guidance=scale"):
        random_model(distilled).guided(latents, t, context, torch.ones(1))


class TestBias:
    @pytest.mark.parametrize(
        ("dtype", "copies", "tolerance"),
        [(torch.float16, 2, 1e-5), (torch.bfloat16, 3, 1.5e-5), (torch.float32, 1, 1e-6), (torch.float64, 1, 1e-14)],
    )
    def test_exponentials_sum_to_the_token_count(self, dtype: torch.dtype, copies: int, tolerance: float) -> None:
        for tokens in range(1, 5481):
            bias = null_token_bias(tokens, dtype, torch.device("cpu"))
            assert bias.shape == (copies,) and bias.dtype == dtype
            assert math.fsum(math.exp(b) for b in bias.tolist()) == pytest.approx(tokens, rel=tolerance), tokens

    def test_one_rounded_copy_would_not(self) -> None:
        for dtype, least in ((torch.float16, 0.003), (torch.bfloat16, 0.015)):
            tokens = torch.arange(1, 5481, dtype=torch.float64)
            error = tokens.log().to(dtype).double().exp() / tokens - 1
            assert error.abs().max() > least

    def test_float64_is_exact(self) -> None:
        assert null_token_bias(1370, torch.float64, torch.device("cpu")).item() == math.log(1370)


# Small token counts T whose rounded ln(T) is furthest off: its exponential misses T by 0.19 % in fp16 and 1.5 % in bf16.
WORST = {torch.float16: (197, 262), torch.bfloat16: (125, 241, 385)}


@pytest.fixture
def one_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """one_copy(True) leaves a single copy of the null token; one_copy(False) restores all copies."""
    copies = dict(model_module._NULL_REMAINDERS)
    yield lambda single: monkeypatch.setattr(model_module, "_NULL_REMAINDERS", {} if single else copies)


@pytest.mark.parametrize("dtype", WORST)
def test_copies_remove_the_error_of_the_rounded_bias(
    dtype: torch.dtype, one_copy: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of the unconditional velocity (scale 0) against float64, over several networks and token counts.

    Rounding noise hides a small systematic error in a plain norm, so the error is also projected on the change that a
    single rounded bias makes. 1 means that the graph has this whole error, as if T were another number, and 0 that it has none.
    """
    config = dataclasses.replace(CONFIG, hidden_size=32, num_heads=1, depth=1)
    norms: dict[str, list[Tensor]] = {"plain": [], "copies": [], "one": [], "repeat": []}
    miscounted: dict[str, list[Tensor]] = {name: [] for name in norms}
    for tokens in WORST[dtype]:
        for seed in range(3):
            half, double = random_model(config, seed, dtype=dtype), random_model(config, seed, dtype=dtype).double()
            generator = torch.Generator().manual_seed(seed)
            latents = torch.randn(2, tokens, config.in_channels, generator=generator).to(dtype).float()
            t, scale = torch.rand(2, generator=generator), torch.zeros(2)
            context = torch.zeros(2, tokens, config.context_in_dim)
            expected = double(latents.double(), t.double(), context.double())
            with monkeypatch.context() as patch:
                rounded = torch.tensor([math.log(tokens)]).to(dtype).double()
                patch.setattr(model_module, "null_token_bias", lambda *_, bias=rounded: bias)
                shift = double.guided(latents.double(), t.double(), context.double(), scale.double()) - expected
            found = {"plain": half(latents, t, context), "repeat": half.guided(latents, t, context, scale, form="repeat")}
            for name in ("copies", "one"):
                one_copy(name == "one")
                found[name] = half.guided(latents, t, context, scale)
            for name, velocity in found.items():
                error = velocity.double() - expected
                norms[name].append(error.norm() / expected.norm())
                miscounted[name].append((error * shift).sum() / (shift * shift).sum())
    size = {name: float(torch.stack(values).square().mean().sqrt()) for name, values in norms.items()}
    count = {name: float(torch.stack(values).mean()) for name, values in miscounted.items()}
    assert count["one"] > 0.6
    assert all(abs(count[name]) < 0.4 for name in ("copies", "plain", "repeat"))
    assert max(size["copies"], size["repeat"]) < size["one"]
    assert max(size["copies"], size["repeat"]) <= 1.05 * size["plain"]
