"""The precision of each part of the arithmetic, and the inputs that the model refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.dit import DiTConfig, random_model
from hunyuan3d_export.dit.layers import sinusoid_frequencies, timestep_embedding

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
RelativeError = Callable[[Tensor, Tensor], float]
HALVES = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_weights_return_the_latents_dtype(
    dtype: torch.dtype, narrow: DiTConfig, distilled: DiTConfig, draw: Draw, relative_error: RelativeError
) -> None:
    latents, t, context = draw(narrow, 2, 9, 5)
    scale = torch.tensor([5.0, 1.5])
    half, full = random_model(narrow, dtype=dtype), random_model(narrow)
    for found, expected in (
        (half(latents, t, context.half()), full(latents, t, context)),
        (half.guided(latents, t, context.half(), scale), full.guided(latents, t, context, scale)),
        (random_model(distilled, dtype=dtype)(latents, t, context, scale), random_model(distilled)(latents, t, context, scale)),
    ):
        assert found.dtype == torch.float32
        assert 0 < relative_error(found, expected) < HALVES[dtype] * 3
    assert half(latents.to(dtype), t, context).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_t_stays_float32_into_the_sinusoids(
    dtype: torch.dtype, narrow: DiTConfig, draw: Draw, relative_error: RelativeError
) -> None:
    latents, _, context = draw(narrow, 2, 9, 5)
    t = torch.tensor([48 / 49, 0.7797978])
    half, full = random_model(narrow, dtype=dtype), random_model(narrow)
    expected = full(latents, t, context)
    kept = relative_error(half(latents, t, context), expected)
    rounded = relative_error(half(latents, t.to(dtype), context), expected)
    assert rounded > 3 * kept, (kept, rounded)


@pytest.mark.parametrize("dtype", HALVES)
def test_guidance_stays_float32_into_the_sinusoids(
    dtype: torch.dtype, distilled: DiTConfig, draw: Draw, relative_error: RelativeError
) -> None:
    latents, t, context = draw(distilled, 2, 9, 5)
    guidance = torch.tensor([5.3, 7.7])
    half, full = random_model(distilled, dtype=dtype), random_model(distilled)
    expected = full(latents, t, context, guidance)
    kept = relative_error(half(latents, t, context, guidance), expected)
    assert relative_error(half(latents, t, context, guidance.to(dtype)), expected) > 3 * kept


def test_timestep_embedding_by_its_formula() -> None:
    t = torch.tensor([0.0, 0.25, 1.0, 5.0])
    found = timestep_embedding(t, sinusoid_frequencies())
    k = torch.arange(128, dtype=torch.float64)
    angles = 1000 * t.double()[:, None] * 1000 ** (-k / 128)
    assert found.shape == (4, 256) and found.dtype == torch.float32
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    # t = 5 makes angles of 5000, which float32 resolves only to 0.0005, so the tolerance is wider with it.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[:3].double(), expected[:3], rtol=0, atol=1e-4)


def test_timestep_embedding_is_float32_for_every_input_type() -> None:
    frequencies = sinusoid_frequencies()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        t = torch.tensor([0.125, 0.75], dtype=dtype)  # values that every dtype holds exactly
        assert torch.equal(timestep_embedding(t, frequencies), timestep_embedding(t.float(), frequencies))


def test_guidance_must_fit_the_weights(narrow: DiTConfig, distilled: DiTConfig, draw: Draw) -> None:
    inputs = draw(narrow, 1, 4, 3)
    with pytest.raises(ValueError, match="guidance must be None for a base model, got a tensor"):
        random_model(narrow)(*inputs, torch.ones(1))
    with pytest.raises(ValueError, match="guidance must be given to a guidance-distilled model, got None"):
        random_model(distilled)(*inputs)


def test_samples_of_a_batch_do_not_see_each_other(narrow: DiTConfig, draw: Draw) -> None:
    model = random_model(narrow, dtype=torch.float64)
    latents, t, context = draw(narrow, 3, 9, 5, torch.float64)
    together = model(latents, t, context)
    alone = torch.cat([model(latents[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_tokens_have_no_order(narrow: DiTConfig, draw: Draw) -> None:
    model = random_model(narrow, dtype=torch.float64)
    latents, t, context = draw(narrow, 1, 9, 5, torch.float64)
    expected = model(latents, t, context)
    torch.testing.assert_close(model(latents.flip(1), t, context.flip(1)), expected.flip(1), rtol=1e-12, atol=1e-12)
