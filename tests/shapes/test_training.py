"""The training script: its data are fair, its loss falls."""

import numpy as np
import pytest
import torch

from hunyuan3d_export.dit import PRESETS, Hunyuan3DDiT
from hunyuan3d_export.shapes import TRAINED_PROMPTS, decode_points, frame, solid

pytest.importorskip("scipy", reason="needs the shapes extra")
import clouds
import optimizing
import train
import train_encoder

PROMPTS = ("cube", "flat cube", "two tall cones")


@pytest.fixture(scope="module")
def pairs():
    return {prompt: clouds.matched_pairs(prompt, 2, seed=5) for prompt in PROMPTS}


def test_matching_permutes_the_noise_and_nothing_else(pairs):
    for prompt, bank in pairs.items():
        noise, points = bank[:, 0], bank[:, 1]
        assert solid(prompt).distance(points).max() < 1e-6
        assert np.abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1.0, abs=0.05)
        matched = np.square(noise - points).sum(-1).mean()
        shuffled = np.square(noise - np.roll(points, 1, axis=1)).sum(-1).mean()
        assert matched < 0.8 * shuffled


def test_a_batch_has_one_length_of_prompt_and_unit_noise(pairs):
    source = clouds.Clouds(pairs, tokens=512, seed=0)
    lengths = set()
    for _ in range(20):
        batch = source.draw()
        assert batch.noise.shape == batch.data.shape == (512 // batch.data.shape[1], batch.data.shape[1], 64)
        assert batch.context.shape[0] == len(batch.data) and batch.context.shape[2] == 1536
        lengths.add(batch.context.shape[1])
        assert float(batch.noise.std()) == pytest.approx(1.0, abs=0.05)
        assert min(solid(prompt).distance(decode_points(batch.data[0].numpy())).max() for prompt in PROMPTS) < 1e-5
    assert lengths == {1, 2, 3}


def test_some_contexts_are_dropped(pairs):
    source = clouds.Clouds(pairs, tokens=4096, seed=0)
    dropped = [bool((row == 0).all()) for _ in range(40) for row in source.draw().context]
    assert 0.05 < np.mean(dropped) < 0.15


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch takes a slower kernel
def test_three_steps_on_one_batch_lower_the_loss(pairs):
    batch = clouds.Clouds(pairs, tokens=512, seed=0).draw()
    model = train.new_model(PRESETS["tiny"].config, seed=0)
    optimizers = train.new_optimizers(model, lr=2e-3)
    basis, t = torch.from_numpy(frame()).float(), torch.linspace(0, 0.9, len(batch.data))
    losses = []
    for _ in range(4):
        loss = train.flow_loss(model, batch, t, basis)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[3] < losses[2] < losses[0]


def test_a_new_model_already_predicts_the_velocity_of_pure_noise():
    noise = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(0))
    velocity = train.new_model(PRESETS["tiny"].config, seed=0)(noise, torch.zeros(2), torch.zeros(2, 3, 1536))
    assert float((velocity + noise).detach().std()) < 0.2


def test_every_block_of_a_new_model_is_the_identity():
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 9, 64, generator=generator), torch.randn(2, 5, 1536, generator=generator)
    model = train.new_model(PRESETS["tiny"].config, seed=0)
    assert unchanged(model, latents, context) == [True] * (model.config.depth + model.config.depth_single_blocks)
    # The constructor alone, like upstream's, draws the gates at random: only the training script sets them to zero.
    assert not any(unchanged(Hunyuan3DDiT(PRESETS["tiny"].config), latents, context))


@torch.no_grad()
def unchanged(model, latents, context):
    """For each block, whether both streams, or the one sequence, leave it bit for bit as they entered."""
    found = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, out: found.append(all(map(torch.equal, inputs, out))))
        for block in model.double_blocks
    ]
    hooks += [
        block.register_forward_hook(lambda _, inputs, out: found.append(torch.equal(inputs[0], out)))
        for block in model.single_blocks
    ]
    model(latents, torch.tensor([0.2, 0.9]), context)
    for hook in hooks:
        hook.remove()
    return found


def test_the_loss_of_the_true_velocity_is_zero(pairs):
    batch = clouds.Clouds(pairs, tokens=512, seed=0).draw()
    t = torch.linspace(0, 0.9, len(batch.data))
    basis = torch.from_numpy(frame()).float()

    def truth(latents, t, context):
        assert latents.dtype == torch.float32 and context.shape[2] == 1536
        return (batch.data - latents) / (1 - t)[:, None, None]

    assert train.flow_loss(truth, batch, t, basis) < 1e-8
    assert train.flow_loss(lambda *inputs: -truth(*inputs), batch, t, basis) > 1


def test_the_schedule_of_the_learning_rate():
    assert optimizing.learning_rate(0.0, 0) < 0.01
    assert optimizing.learning_rate(0.0, 10_000) == 1.0
    assert optimizing.learning_rate(1.0, 10_000) == pytest.approx(0.0)
    optimizers = train.new_optimizers(train.new_model(PRESETS["tiny"].config, seed=0), lr=0.008)
    for factor in (0.5, 0.25):
        optimizing.set_learning_rate(optimizers, factor)
        assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [factor * 0.008, factor * 0.002]


def test_times_lean_towards_the_data():
    t = train.draw_times(20_000, torch.Generator().manual_seed(0))
    assert 0 <= t.min() and t.max() <= 1
    assert 0.55 < t.mean() < 0.65
    assert (t < 0.05).float().mean() > 0.01


def test_held_out_prompts_are_never_trained(pairs):
    with pytest.raises(ValueError, match="trained"):
        clouds.Clouds({**pairs, "flat cone": pairs["cube"]}, tokens=512, seed=0)
    assert "flat cone" not in TRAINED_PROMPTS


def test_the_written_encoder_chooses_one_word_also_where_the_trained_one_hesitates():
    trained = train_encoder.new_model(seed=0)
    assert trained.head is not None
    with torch.no_grad():
        trained.head.choice.bias.copy_(torch.arange(60) % 20 / 20)  # each word a little likelier than the one before
    written, cls = train_encoder.sharpened(trained, train_encoder.SHARPNESS), torch.zeros(1, 128)
    assert trained.head(cls).abs().amax(-1).max() < 0.9, "a mixture"
    torch.testing.assert_close(written.head(cls)[0], trained.head.vectors[[19, 19, 19]], rtol=0, atol=0.5)
    again = train_encoder.sharpened(written, 1 / train_encoder.SHARPNESS).state_dict()
    assert all(torch.equal(again[name], value) for name, value in trained.state_dict().items()), "what --resume reads"
