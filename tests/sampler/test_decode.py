"""The tensors of a request become a checked request, or a ValueError that names the tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import sample_request
from doubles import PARAMETERS
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from outcomes import NoDenoiser
from parameters import parse
from sample_request import SampleRequest, choose_path, decode, noise
from settings import Settings

from hunyuan3d_client import contract

Tokens = Callable[..., np.ndarray]


def integer(value: int) -> np.ndarray:
    return np.array([value], np.int32)


def test_defaults_are_the_deployed_ones(base: Settings, tokens: Tokens) -> None:
    context = tokens(2, 3)
    found = decode({"context": context}, base, 7)
    assert found.context is context and found.negative_context is None
    assert found.latents.shape == (2, 7, 64) and found.latents.dtype == np.float32
    assert len(found.sigmas) == 51 and found.guidance_scale == 5 and found.preview_every == 0
    np.testing.assert_array_equal(found.latents, noise(np.array([0, 1]), 7))


def test_each_option_is_used(base: Settings, tokens: Tokens) -> None:
    negative, latents = tokens(2, 3, seed=1), np.ones((2, 4, 64), np.float32)
    given = {
        "context": tokens(2, 3),
        "negative_context": negative,
        "latents": latents,
        "steps": integer(4),
        "guidance_scale": np.array([2.5], np.float32),
        "schedule": np.array([b"consistency"], np.object_),
        "preview_every": integer(2),
    }
    found = decode(given, base, 7)
    assert found.negative_context is negative and found.guidance_scale == 2.5 and found.preview_every == 2
    np.testing.assert_allclose(found.sigmas, [0, 249 / 999, 499 / 999, 749 / 999, 1])
    np.testing.assert_array_equal(found.latents, latents)
    assert found.latents is not latents, "the request's memory is Triton's"
    assert decode({"context": tokens(1, 3), "tolerance": np.float32([0.125])}, base, 7).tolerance == 0.125
    short = decode({"context": tokens(1, 3), "num_latents": integer(9)}, base, None)
    assert short.latents.shape == (1, 9, 64)


@pytest.mark.parametrize(("schedule", "steps"), [(b"consistency", 5), (b"flow_match", 6)])
def test_a_tolerance_where_forecasts_are_off_says_so(schedule: bytes, steps: int, base: Settings, tokens: Tokens) -> None:
    tensors = {"context": tokens(1, 3), "schedule": np.array([schedule], np.object_), "steps": integer(steps)}
    assert decode(tensors, base, 7).off_reason is None, "no tolerance, nothing to say"
    found = decode({**tensors, "tolerance": np.float32([0.1])}, base, 7)
    assert found.tolerance == 0 and found.off_reason is not None


@pytest.mark.parametrize(
    ("seeds", "rows"), [([5], [5, 6, 7]), ([9, 2, 9], [9, 2, 9]), ([-1], [-1, 0, 1]), ([2**63 - 2], [2**63 - 2, 2**63 - 1, -(2**63)])]
)  # fmt: skip
def test_seeds(seeds: list[int], rows: list[int], base: Settings, tokens: Tokens) -> None:
    found = decode({"context": tokens(3, 2), "seed": np.array(seeds, np.int64)}, base, 4).latents
    for row, seed in zip(found, rows, strict=True):
        np.testing.assert_array_equal(row, noise(np.array([seed]), 4)[0])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), st.integers(1, 9))
def test_a_row_of_noise_depends_on_its_seed_alone(seeds: list[int], length: int) -> None:
    drawn = noise(np.array(seeds, np.int64), length)
    assert drawn.shape == (len(seeds), length, 64) and drawn.dtype == np.float32
    for row, seed in zip(drawn, seeds, strict=True):
        np.testing.assert_array_equal(row, noise(np.array([seed], np.int64), length)[0])
    for i, seed in enumerate(seeds):
        for other in range(i):
            assert (seed == seeds[other]) == np.array_equal(drawn[i], drawn[other])


def test_noise_is_standard_normal() -> None:
    drawn = noise(np.arange(8), 4096)
    assert abs(drawn.mean()) < 0.005 and abs(drawn.std() - 1) < 0.005
    assert abs((drawn[0] * drawn[1]).mean()) < 0.02, "neighbouring seeds must not correlate"


NAN, INF = np.full((2, 3, 1536), np.nan, np.float16), np.full((2, 3, 1536), np.inf, np.float16)
REFUSALS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "NaN context": ({"context": NAN}, "context must be finite"),
    "infinite context": ({"context": INF}, "context must be finite"),
    "no context tokens": ({"context": NAN[:, :0]}, "context must be .* got shape .2, 0, 1536."),
    "no samples": ({"context": NAN[:0]}, "context must be .* got shape .0, 3, 1536."),
    "flat context": ({"context": NAN[0]}, "context must be .* got shape .3, 1536."),
    "too many context tokens": ({"context": np.zeros((1, 5481, 1536), np.float16)}, "context must be .*1..5480 tokens"),
    "too many samples": ({"context": np.zeros((81, 1, 1536), np.float16)}, "context must be of at most 80 samples, got 81"),
    "NaN negative": ({"negative_context": NAN}, "negative_context must be finite"),
    "other negative": ({"negative_context": NAN[:1]}, "negative_context must be finite"),
    "shorter negative": (
        {"negative_context": np.zeros((2, 2, 1536), np.float16)},
        "negative_context must have context's shape .2, 3, 1536., got .2, 2, 1536.",
    ),
    "NaN latents": ({"latents": np.full((2, 4, 64), np.nan, np.float32)}, "latents must be finite"),
    "no latents": ({"latents": np.zeros((2, 0, 64), np.float32)}, "latents must be .* got shape .2, 0, 64."),
    "too many latents": ({"latents": np.zeros((2, 4097, 64), np.float32)}, "latents must be .*1..4096 tokens"),
    "latents of another batch": (
        {"latents": np.zeros((3, 4, 64), np.float32)},
        "latents must have context's batch size 2, got 3",
    ),
    "latents and num_latents": (
        {"latents": np.zeros((2, 4, 64), np.float32), "num_latents": integer(5)},
        "num_latents must be left out or equal latents' 4",
    ),
    "num_latents 0": ({"num_latents": integer(0)}, "num_latents must be in 1..4096, got 0"),
    "num_latents of a terabyte": ({"num_latents": integer(2**31 - 1)}, "num_latents must be in 1..4096, got 2147483647"),
    "steps 0": ({"steps": integer(0)}, "steps must be in 1..1000 for flow_match, got 0"),
    "steps 1001": ({"steps": integer(1001)}, "steps must be in 1..1000 for flow_match, got 1001"),
    "consistency 101": (
        {"steps": integer(101), "schedule": np.array([b"consistency"], np.object_)},
        "steps must be in 1..100 for consistency, got 101",
    ),
    "schedule": ({"schedule": np.array([b"ddim"], np.object_)}, "schedule must be one of flow_match, consistency, got 'ddim'"),
    "schedule not UTF-8": ({"schedule": np.array([b"\xff"], np.object_)}, "schedule must be one of"),
    "scale NaN": ({"guidance_scale": np.array([np.nan], np.float32)}, "guidance_scale must be finite, got nan"),
    "scale Inf": ({"guidance_scale": np.array([np.inf], np.float32)}, "guidance_scale must be finite, got inf"),
    "two scales": ({"guidance_scale": np.zeros(2, np.float32)}, "guidance_scale must hold one value, got shape .2."),
    "no steps": ({"steps": np.zeros(0, np.int32)}, "steps must hold one value, got shape .0."),
    "tolerance -1": ({"tolerance": np.array([-1], np.float32)}, r"tolerance must be in \[0, 1\), got -1"),
    "tolerance 1": ({"tolerance": np.array([1], np.float32)}, r"tolerance must be in \[0, 1\), got 1"),
    "tolerance NaN": ({"tolerance": np.array([np.nan], np.float32)}, r"tolerance must be in \[0, 1\), got nan"),
    "preview -1": ({"preview_every": integer(-1)}, "preview_every must be 0 or more, got -1"),
    "three seeds": ({"seed": np.zeros(3, np.int64)}, "seed must hold 1 or 2 values, got shape .3."),
    "no seeds": ({"seed": np.zeros(0, np.int64)}, "seed must hold 1 or 2 values, got shape .0."),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str, base: Settings, tokens: Tokens) -> None:
    tensors, message = REFUSALS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        decode({"context": tokens(2, 3), **tensors}, base, 4)


def test_context_must_be_there(base: Settings) -> None:
    with pytest.raises(ValueError, match="^context must be given, got none"):
        decode({"latents": np.zeros((1, 4, 64), np.float32)}, base, 4)


def test_without_a_deployed_preset_the_length_must_be_given(base: Settings, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="num_latents must be in 1..4096, got None"):
        decode({"context": tokens(1, 2)}, base, None)


def test_distilled_weights_take_no_negative_context(distilled: Settings, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="negative_context must be left out for guidance-distilled weights"):
        decode({"context": tokens(1, 2), "negative_context": tokens(1, 2)}, distilled, 4)


DTYPES = {
    "context": np.float16,
    "negative_context": np.float16,
    "latents": np.float32,
    "num_latents": np.int32,
    "steps": np.int32,
    "guidance_scale": np.float32,
    "seed": np.int64,
    "preview_every": np.int32,
    "tolerance": np.float32,
}
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@st.composite
def any_tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Tensors of any shapes and values; their types are right, because Triton refuses others."""
    names = draw(st.sets(st.sampled_from(list(DTYPES)))) | {"context"}
    usual = st.sampled_from([(1,), (2,), (1, 3, 2), (2, 3, 2)])
    found = {name: draw(arrays.arrays(DTYPES[name], draw(usual | SHAPES))) for name in sorted(names)}
    if draw(st.booleans()):
        found["schedule"] = np.array(draw(st.lists(st.binary(max_size=4) | st.just(b"flow_match"), max_size=2)), np.object_)
    return found


@hypothesis_settings(max_examples=400, deadline=None)
@given(any_tensors())
def test_anything_is_a_request_or_a_value_error(tensors: dict[str, np.ndarray]) -> None:
    base = parse(Settings, {**PARAMETERS, "steps": "4"})
    try:
        found = decode(tensors, base, 4)
    except ValueError:
        return
    assert len(found.latents) == len(found.context) and np.isfinite(found.latents).all()
    assert 2 <= len(found.sigmas) <= 1001 and np.isfinite(found.guidance_scale)


PATH_TABLE = [
    # distilled, negative, scale, plain, guided -> path
    (False, False, 5.0, True, True, "guided"),
    (False, False, 5.0, True, False, "two-batch"),
    (False, False, 5.0, False, True, "guided"),
    (False, False, 1.0, True, True, "plain"),
    (False, False, 1.0, True, False, "plain"),
    (False, False, 1.0, False, True, "guided"),
    (False, False, 0.0, True, True, "guided"),
    (False, True, 5.0, True, True, "two-batch"),
    (False, True, 5.0, False, True, None),
    (False, False, 5.0, False, False, None),
    (False, False, 1.0, False, False, None),
    (True, False, 5.0, True, False, "distilled"),
    (True, False, 1.0, True, False, "distilled"),
    (True, False, 5.0, False, True, None),
]


@pytest.mark.parametrize(("is_distilled", "negative", "scale", "plain", "guided", "path"), PATH_TABLE)
def test_path(
    is_distilled: bool,
    negative: bool,
    scale: float,
    plain: bool,
    guided: bool,
    path: str | None,
    base: Settings,
    request_for: Callable[..., SampleRequest],
) -> None:
    request = request_for(guidance_scale=scale)
    if negative:
        request = dataclasses.replace(request, negative_context=np.zeros_like(request.context))
    options = dataclasses.replace(base, guidance_embed=is_distilled)
    if path is None:
        with pytest.raises(NoDenoiser, match="must be loaded, found none\nhint: deploy the plain graph"):
            choose_path(request, options, plain_ready=plain, guided_ready=guided)
    else:
        assert choose_path(request, options, plain_ready=plain, guided_ready=guided) == path


def test_constants_are_the_contracts() -> None:
    assert sample_request.CHANNELS == contract.LATENT_CHANNELS
    assert contract.AXES["L"].max == sample_request.MOST_LATENTS and contract.AXES["T"].max == sample_request.MOST_CONTEXT
    assert sample_request.PATHS == ("plain", "guided", "two-batch", "distilled") == contract.PATHS
    assert sample_request.SamplingPath == contract.SamplingPath
    assert set(DTYPES) | {"schedule"} == {tensor.name for tensor in contract.SAMPLER_INPUTS}
    assert {tensor.name: tensor.numpy_dtype for tensor in contract.SAMPLER_INPUTS if tensor.dtype != "BYTES"} == DTYPES
