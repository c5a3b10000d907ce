"""The real server's results against torch, for every path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan3d_client import Client, contract
from hunyuan3d_client.errors import InvalidInput
from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.dit import Hunyuan3DDiT
from hunyuan3d_export.dit.network import example_inputs
from hunyuan3d_export.dit.reference_sampler import sample, sigmas
from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]
# The last bits of ONNX Runtime's matrix products depend on the number of rows, so neighbours in a batch may change them.
SHARED_BATCH = 1e-5


def distance(found: np.ndarray, expected: np.ndarray | torch.Tensor) -> float:
    return relative_l2(torch.tensor(found), torch.as_tensor(expected))


def in_torch(model: Hunyuan3DDiT, context: np.ndarray, noise: np.ndarray, **options: Any) -> torch.Tensor:
    steps, schedule = options.pop("steps"), options.pop("schedule", "flow_match")
    return sample(model, torch.from_numpy(context), torch.from_numpy(noise), sigmas(schedule, steps), **options)


@pytest.fixture(scope="module")
def plain_client(served_plain: Endpoints) -> Iterator[Client]:
    with Client(served_plain.grpc, timeout_s=120) as client:
        yield client


@pytest.fixture(scope="module")
def distilled_client(served_distilled: Endpoints) -> Iterator[Client]:
    with Client(served_distilled.grpc, timeout_s=120) as client:
        yield client


@pytest.mark.parametrize("sizes", [(1, 40, 19), (3, 5, 1), (2, 1, 130), (11, 6, 4), (1, 7, 1370)], ids=str)
def test_denoise(sizes: tuple[int, int, int], client: Client, model: Hunyuan3DDiT) -> None:
    inputs = example_inputs(sizes)
    found = client.denoise(*(inputs[name].numpy() for name in ("latents", "t", "context")))
    assert found.dtype == np.float32 and distance(found, model(**inputs)) <= 1e-5


@pytest.mark.parametrize("sizes", [(1, 40, 19), (3, 5, 1), (2, 1, 130), (11, 6, 4)], ids=str)
def test_denoise_guided(sizes: tuple[int, int, int], client: Client, model: Hunyuan3DDiT) -> None:
    inputs, scale = example_inputs(sizes), torch.linspace(0.5, 6, sizes[0])
    found = client.denoise(*(inputs[name].numpy() for name in ("latents", "t", "context")), guidance_scale=scale.numpy())
    assert distance(found, model.guided(**inputs, guidance_scale=scale)) <= 1e-5


def test_50_guided_steps(client: Client, plain_client: Client, model: Hunyuan3DDiT, tokens: Make, noise: Make) -> None:
    """The main claim: the guided graph, which computes both branches, equals upstream's two batches in torch."""
    context, start = tokens(2, 37), noise(2, 29)
    guided = client.sample(context, latents=start, steps=50, guidance_scale=5.0)
    two_batch = plain_client.sample(context, latents=start, steps=50, guidance_scale=5.0)
    expected = in_torch(model, context, start, steps=50, guidance_scale=5.0)
    assert distance(guided, expected) <= 1e-4
    assert distance(two_batch, expected) <= 1e-4
    assert distance(guided, two_batch) <= 1e-4


def test_the_path_is_reported(client: Client, plain_client: Client, tokens: Make) -> None:
    def path(client: Client, **options: Any) -> set[str]:
        return {step.path for step in client.stream(tokens(1, 3), num_latents=4, steps=3, preview_every=0, **options)}

    assert path(client) == {"guided"} and path(plain_client) == {"two-batch"}
    assert path(client, guidance_scale=1) == path(plain_client, guidance_scale=1) == {"plain"}
    assert path(client, negative_context=tokens(1, 3, seed=1)) == {"two-batch"}


def test_scale_one_is_the_plain_loop(client: Client, model: Hunyuan3DDiT, tokens: Make, noise: Make) -> None:
    context, start = tokens(1, 9), noise(1, 6)
    found = client.sample(context, latents=start, steps=8, guidance_scale=1.0)
    assert distance(found, in_torch(model, context, start, steps=8, guidance_scale=1.0, path="plain")) <= 1e-4


def test_negative_context(client: Client, model: Hunyuan3DDiT, tokens: Make, noise: Make) -> None:
    context, negative, start = tokens(2, 9), tokens(2, 9, seed=1), noise(2, 6)
    found = client.sample(context, latents=start, steps=8, guidance_scale=3.0, negative_context=negative)
    expected = in_torch(model, context, start, steps=8, guidance_scale=3.0, negative_context=torch.from_numpy(negative))
    assert distance(found, expected) <= 1e-4
    assert distance(found, client.sample(context, latents=start, steps=8, guidance_scale=3.0)) > 1e-2


def test_consistency_schedule(client: Client, model: Hunyuan3DDiT, tokens: Make, noise: Make) -> None:
    context, start = tokens(1, 9), noise(1, 6)
    steps = list(client.stream(context, latents=start, steps=5, schedule="consistency", guidance_scale=2.0))
    np.testing.assert_allclose([step.t for step in steps], sigmas("consistency", 5)[1:], atol=1e-6)
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    expected = in_torch(model, context, start, steps=5, schedule="consistency", guidance_scale=2.0)
    assert distance(steps[-1].latents, expected) <= 1e-4


def test_defaults_are_the_deployed_presets(client: Client, tokens: Make) -> None:
    *_, last = client.stream(tokens(1, 2), num_latents=3, preview_every=0)
    assert last.total == 50 and last.path == "guided"
    explicit = client.sample(tokens(1, 2), num_latents=3, steps=50, guidance_scale=5.0, seed=0, schedule="flow_match")
    np.testing.assert_array_equal(last.latents, explicit)
    assert client.sample(tokens(1, 2), steps=2).shape == (1, 3072, 64)


def test_previews(client: Client, tokens: Make) -> None:
    def previews(every: int) -> list[int]:
        steps = list(client.stream(tokens(1, 2), num_latents=3, steps=6, preview_every=every))
        assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6], "the last step has size 0"
        return [step.index for step in steps if step.latents is not None]

    assert (previews(0), previews(1), previews(2)) == ([6], [1, 2, 3, 4, 5, 6], [2, 4, 6])
    first = next(iter(client.stream(tokens(1, 2), num_latents=3, steps=6)))
    assert first.t == pytest.approx(0.2) and first.total == 6


def test_each_option_changes_the_result(client: Client, tokens: Make) -> None:
    defaults = {"steps": 6, "num_latents": 5, "seed": 3, "guidance_scale": 4.0, "schedule": "flow_match"}
    changes = {
        "steps": 7,
        "seed": 4,
        "guidance_scale": 4.5,
        "schedule": "consistency",
        "negative_context": tokens(1, 4, seed=9),
    }
    results = [client.sample(tokens(1, 4), **defaults)]
    results += [client.sample(tokens(1, 4), **{**defaults, name: value}) for name, value in changes.items()]
    for one, other in itertools.combinations(results, 2):
        assert distance(one, other) > 1e-4
    assert client.sample(tokens(1, 4), **{**defaults, "num_latents": 6}).shape == (1, 6, 64)


def test_row_0_of_a_batch_is_the_single_run(client: Client, tokens: Make) -> None:
    context = np.repeat(tokens(1, 9), 3, axis=0)
    options = {"num_latents": 17, "steps": 12}
    batch = client.sample(context, seed=5, **options)
    for i, row in enumerate(batch):
        assert distance(row[None], client.sample(context[:1], seed=5 + i, **options)) <= SHARED_BATCH
    picked = client.sample(context[:2], seed=[7, 5], **options)
    assert distance(picked[1:], batch[:1]) <= SHARED_BATCH


def test_the_same_seed_gives_the_same_result_whoever_shares_the_batch(client: Client, tokens: Make) -> None:
    options = {"num_latents": 17, "steps": 30}
    alone = client.sample(tokens(1, 9), seed=5, **options)
    np.testing.assert_array_equal(client.sample(tokens(1, 9), seed=5, **options), alone)
    with ThreadPoolExecutor(6) as pool:
        seeds = [5, 6, 5, 7, 8, 5]
        runs = list(pool.map(lambda seed: client.sample(tokens(1, 9), seed=seed, **options), seeds))
    for seed, found in zip(seeds, runs, strict=True):
        if seed == 5:
            assert distance(found, alone) <= SHARED_BATCH
        else:
            assert distance(found, alone) > 1e-2


def test_distilled_weights(distilled_client: Client, micro_distilled: Any, tokens: Make, noise: Make) -> None:
    model = micro_distilled.load(torch.float32)
    context, start = tokens(2, 9), noise(2, 6)
    steps = list(distilled_client.stream(context, latents=start, preview_every=0))
    assert {(step.path, step.total) for step in steps} == {("distilled", 5)}
    expected = in_torch(model, context, start, steps=5, schedule="consistency", guidance_scale=5.0, path="distilled")
    assert distance(steps[-1].latents, expected) <= 1e-4
    velocity = distilled_client.denoise(start, 0.25, context, guidance=[2.0, 0.5])
    inputs = (torch.from_numpy(start), torch.full((2,), 0.25), torch.from_numpy(context), torch.tensor([2.0, 0.5]))
    assert distance(velocity, model(*inputs)) <= 1e-5


def test_guidance_and_weights_must_fit(client: Client, distilled_client: Client, tokens: Make, noise: Make) -> None:
    with pytest.raises(InvalidInput, match="guidance must be left out for hunyuan3d_dit on this server"):
        client.denoise(noise(1, 3), 0.5, tokens(1, 2), guidance=5.0)
    with pytest.raises(InvalidInput, match="guidance must be given for hunyuan3d_dit on this server"):
        distilled_client.denoise(noise(1, 3), 0.5, tokens(1, 2))
    with pytest.raises(InvalidInput, match="negative_context must be left out for guidance-distilled weights"):
        distilled_client.sample(tokens(1, 2), num_latents=3, negative_context=tokens(1, 2))
    assert contract.DIT_GUIDED not in {model.name for model in distilled_client.health().models if model.ready}
