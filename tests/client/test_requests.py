"""Validation and encoding, against the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan3d_client import InvalidInput, contract, noise, requests
from hunyuan3d_client.transport import MockTransport

FLOATS = st.sampled_from([np.float16, np.float32, np.float64])
SIZES = st.integers(1, 4)
SAMPLER = MockTransport().models[contract.SAMPLER]


def latents(batch: int = 1, length: int = 3, dtype: Any = np.float32) -> np.ndarray:
    return np.ones((batch, length, contract.LATENT_CHANNELS), dtype)


def context(batch: int = 1, length: int = 2, dtype: Any = np.float16) -> np.ndarray:
    return np.ones((batch, length, contract.CONTEXT_WIDTH), dtype)


def denoise(x: Any = None, t: Any = 0.5, c: Any = None, **scales: Any) -> tuple[str, dict[str, np.ndarray]]:
    scales = {"guidance": None, "guidance_scale": None, **scales}
    return requests.denoise(latents() if x is None else x, t, context() if c is None else c, **scales)


def check(error: pytest.ExceptionInfo[InvalidInput], name: str) -> None:
    head, *hint = str(error.value).splitlines()
    assert head.startswith(name) and " must be " in head and ", got " in head
    assert len(hint) == 1 and hint[0].startswith("hint: ")


@settings(deadline=None, max_examples=30)
@given(batch=SIZES, length=SIZES, tokens=SIZES, dtypes=st.tuples(FLOATS, FLOATS))
def test_valid_inputs_take_the_contract_form(batch: int, length: int, tokens: int, dtypes: tuple[Any, Any]) -> None:
    name, inputs = denoise(latents(batch, length, dtypes[0]), np.linspace(0, 1, batch), context(batch, tokens, dtypes[1]))
    spec = contract.denoiser()
    sizes = {"B": batch, "L": length, "T": tokens}
    assert name == contract.DIT and set(inputs) == {tensor.name for tensor in spec.inputs}
    for tensor in spec.inputs:
        assert inputs[tensor.name].shape == tensor.shape(sizes) and inputs[tensor.name].dtype == tensor.numpy_dtype


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from([[], [0], [63], [64], [65], [1536]])).map(
        lambda parts: (*parts[0], *parts[1])
    ),
    dtype=st.sampled_from([np.float32, np.int64, np.complex64, np.bool_, np.object_, np.str_]),
    name=st.sampled_from(["latents", "context"]),
)
def test_no_wrong_shape_or_dtype_passes(shape: tuple[int, ...], dtype: Any, name: str) -> None:
    spec = contract.denoiser().input(name)
    value = np.zeros(shape, dtype)
    right_rank = shape if len(shape) == 3 else (1, *shape)
    if dtype is np.float32 and len(right_rank) == 3 and right_rank[2] == spec.dims[2] and min(right_rank) > 0:
        requests._tensor(spec, value, {})
        return
    with pytest.raises(InvalidInput) as error:
        requests._tensor(spec, value, {})
    check(error, name)


@settings(deadline=None, max_examples=30)
@given(value=st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_a_finite_value_arrives_finite_or_is_refused(value: float) -> None:
    wide = context(dtype=np.float64)
    wide[0, -1, 3] = value
    if abs(value) < 65520:  # float16 rounds this and larger values to infinity
        assert denoise(c=wide)[1]["context"][0, -1, 3] == np.float16(value)
        return
    with pytest.raises(InvalidInput, match="float16's range") as error:
        denoise(c=wide)
    check(error, "context")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["latents", "context"])
def test_non_finite_tensors_are_refused(bad: float, name: str) -> None:
    arrays = {"latents": latents(), "context": context()}
    arrays[name][0, 0, 5] = bad
    with pytest.raises(InvalidInput, match="finite") as error:
        denoise(arrays["latents"], 0.5, arrays["context"])
    check(error, name)


def test_finite_by_bits_is_finite_for_every_float16() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert [requests._finite(value) for value in every.reshape(-1, 1)] == np.isfinite(every).tolist()


@pytest.mark.parametrize("t", [-0.01, 1.01, np.nan, np.inf, "0.5", None, True, 1j, [0.5, 0.5], [[0.5]], object()])
def test_bad_t(t: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        denoise(t=t)
    check(error, "t")


@pytest.mark.parametrize("t", [0, 1, 0.25, np.float64(0.25), np.array(0.25), [0.25], np.array([0.25], np.float16)])
def test_good_t(t: Any) -> None:
    inputs = denoise(latents(1), t, context(1))[1]
    assert inputs["t"].dtype == np.float32 and inputs["t"].shape == (1,) and inputs["t"][0] == np.float32(np.ravel(t)[0])


def test_scalars_spread_over_the_batch() -> None:
    name, inputs = denoise(latents(3), 0.5, context(3), guidance_scale=[1, 2, 3])
    assert name == contract.DIT_GUIDED
    np.testing.assert_array_equal(inputs["t"], np.float32([0.5, 0.5, 0.5]))
    np.testing.assert_array_equal(inputs["guidance_scale"], np.float32([1, 2, 3]))


@pytest.mark.parametrize(
    "scales", [{"guidance": np.nan}, {"guidance_scale": "5"}, {"guidance_scale": [1, 2]}, {"guidance": 1e39}]
)
def test_bad_scales(scales: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as error:
        denoise(**scales)
    check(error, next(iter(scales)))


def test_both_scales_are_refused() -> None:
    with pytest.raises(InvalidInput, match="guidance_scale must be None beside guidance"):
        denoise(guidance=3, guidance_scale=5)


@pytest.mark.parametrize(
    ("x", "c", "name"),
    [
        (latents(2), context(3), "context must be .* with B = 2"),
        (latents(1, 4097), context(), "latents must be .* with L from 1 to 4096"),
        (latents(), context(1, 5481), "context must be .* with T from 1 to 5480"),
        (latents(0), context(0), "latents"),
        (latents(1, 0), context(), "latents"),
        (latents(), context(1, 0), "context"),
    ],
)
def test_axes_out_of_range_or_apart(x: np.ndarray, c: np.ndarray, name: str) -> None:
    with pytest.raises(InvalidInput, match=name) as error:
        denoise(x, 0.5, c)
    check(error, name.split()[0])


def test_missing_batch_axis_means_one() -> None:
    inputs = denoise(latents()[0], 0.5, context()[0])[1]
    assert inputs["latents"].shape == (1, 3, 64) and inputs["context"].shape == (1, 2, 1536)


class Elsewhere:
    """An array on a device. The subclasses imitate torch and cupy, so neither package is needed."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("not on the host")


class Torch(Elsewhere):
    def detach(self) -> Torch:
        return self

    def cpu(self) -> np.ndarray:
        return self._array


class Cupy(Elsewhere):
    __cuda_array_interface__ = "device memory"

    def get(self) -> np.ndarray:
        return self._array


@pytest.mark.parametrize("kind", [Torch, Cupy, np.ndarray.tolist])
def test_other_libraries_arrays(kind: Any) -> None:
    np.testing.assert_array_equal(denoise(kind(latents()))[1]["latents"], latents())


def test_unreadable_array_is_an_input_error() -> None:
    with pytest.raises(InvalidInput, match="not on the host") as error:
        denoise(Elsewhere(latents()))
    check(error, "latents")


def sample(**options: Any) -> dict[str, np.ndarray]:
    options = {"seed": 0, "preview_every": 0, **options}
    return requests.sample(options.pop("context", context()), options)


def test_defaults_are_left_to_the_server() -> None:
    assert set(sample(steps=None, schedule=None, latents=None)) == {"context", "seed", "preview_every"}


def test_every_option_is_encoded_by_the_contract() -> None:
    everything = {
        "negative_context": context(),
        "num_latents": 9,
        "steps": np.int64(7),
        "guidance_scale": 5,
        "seed": 2**40,
        "schedule": "consistency",
        "preview_every": 2,
        "tolerance": 0.125,
    }
    inputs = {**sample(**everything), **sample(latents=latents())}
    assert set(inputs) == {spec.name for spec in contract.SAMPLER_INPUTS}
    for spec in contract.SAMPLER_INPUTS:
        sizes = {"B": 1, "T": 2, "L": 3, "S": 1}
        assert inputs[spec.name].shape == spec.shape(sizes) and inputs[spec.name].dtype == spec.numpy_dtype
    assert inputs["schedule"][0] == b"consistency" and inputs["seed"][0] == 2**40


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 101, "schedule": "consistency"}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"num_latents": 0}, "num_latents"),
        ({"num_latents": 4097}, "num_latents"),
        ({"preview_every": -1}, "preview_every"),
        ({"schedule": "euler"}, "schedule"),
        ({"schedule": ["flow_match"]}, "schedule"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale"),
        ({"guidance_scale": np.inf}, "guidance_scale"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"latents": latents(), "num_latents": 3}, "num_latents and seed"),
        ({"latents": latents(), "seed": 1}, "num_latents and seed"),
        ({"latents": latents(2)}, "latents"),
        ({"negative_context": context(1, 3)}, "negative_context"),
        ({"context": context(1, 0)}, "context"),
        ({"context": latents()}, "context"),
    ],
)
def test_bad_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        sample(**options)
    check(error, name)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**62), batch=SIZES)
def test_seeds(seed: int, batch: int) -> None:
    assert sample(context=context(batch), seed=seed)["seed"].tolist() == [seed]
    many = [seed + 3 * index for index in range(batch)]
    assert sample(context=context(batch), seed=many)["seed"].tolist() == many
    assert sample(context=context(batch), seed=np.array(many))["seed"].tolist() == many


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**62), batch=st.integers(1, 3), length=st.integers(1, 9))
def test_noise_is_what_the_server_draws(seed: int, batch: int, length: int) -> None:
    from sample_request import noise as served

    found = noise(seed, length, batch=batch)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, served(np.arange(seed, seed + batch), length))
    np.testing.assert_array_equal(noise([seed] * batch, length, batch=batch)[-1:], noise(seed, length))


def test_noise_uses_all_64_bits_and_is_normal() -> None:
    assert not np.array_equal(noise(1, 5), noise(1 + 2**32, 5)) and not np.array_equal(noise(1, 5), noise(1 + 2**61, 5))
    many = noise(3, 4096)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "name"), [((-1, 5), "seed"), (([1, 2], 5), "seed"), ((0, 0), "num_latents"), ((0, 4097), "num_latents")]
)
def test_bad_noise(arguments: tuple[Any, int], name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        noise(*arguments)
    check(error, name)
