"""Trains the `shapes` preset by flow matching: python examples/shapes/train.py --out build/shapes"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan3d_client.shapes import frame
from hunyuan3d_export.dit import PRESETS, DiTConfig, Hunyuan3DDiT, save_checkpoint
from hunyuan3d_export.files import sha256

sys.path.insert(0, str(Path(__file__).parent))
from clouds import Batch, Clouds, load_pairs

log = logging.getLogger("train")

EMA_DECAY = 0.999
ADAMW_LR = 2e-3
WARMUP_STEPS = 200
CARRIED_WEIGHT, REST_WEIGHT = 8.0, 4.0
SAVE_EVERY = 500
CHECKPOINT_NAME = "shapes.safetensors"


def new_model(config: DiTConfig, seed: int) -> Hunyuan3DDiT:
    """A model with torch's default initialisation, except for its gates and its first and last layers.

    Every gate starts at zero, so that each block starts as the identity. The first layer starts as an orthogonal matrix and the
    last layer as minus its transpose, so the model's first output is minus the normalised input. This is already the velocity
    of the 61 channels that hold only noise. If the last layer started at zero, these channels would not learn it.
    """
    torch.manual_seed(seed)
    model = Hunyuan3DDiT(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    gain = (config.hidden_size / config.in_channels) ** 0.5  # unit variance in, unit variance out
    with torch.no_grad():
        nn.init.orthogonal_(model.latent_in.weight, gain)
        model.final_layer.linear.weight.copy_(-model.latent_in.weight.T / gain**2)
        for layer in (model.latent_in, model.final_layer.linear):
            layer.bias.zero_()
    return model


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Flow times [count], three quarters logit-normal towards the data, where the distance to the surface is decided."""
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    leaning = torch.sigmoid(0.6 + 1.2 * normal)
    return torch.where(torch.rand(count, generator=generator) < 0.75, leaning, uniform)


def flow_loss(model: nn.Module, batch: Batch, t: Tensor, basis: Tensor) -> Tensor:
    """Mean squared velocity error, scalar.

    The three channels that carry the points have a larger weight. The error of the other 61 is weighted with its effect on the
    clean latents, (1-t)^2, because otherwise most of the model's capacity would go into learning to divide by 1-t.
    """
    wide = t[:, None, None]
    latents = (1 - wide) * batch.noise + wide * batch.data
    # bfloat16 is a third faster on CPUs that have it, and precise enough for gradients: the averaged weights stay float32.
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model(latents, t, batch.context)
    error = velocity - (batch.data - batch.noise)
    carried = error @ basis.T
    rest = error - carried @ basis
    return CARRIED_WEIGHT * carried.square().mean() + REST_WEIGHT * ((1 - wide) ** 2 * rest.square()).mean()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Updates the exponential moving average of the weights. The decay is smaller in the first steps."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def new_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, at `lr`, and AdamW for everything else.

    After 300 steps of 1024 tokens the loss is 1.54, against 1.94 with AdamW alone.
    """
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "blocks." in name]
    others = [value for name, value in model.named_parameters() if value.ndim != 2 or "blocks." not in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets the rate of every parameter group to `factor` times its initial rate."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


def learning_rate(progress: float, step: int) -> float:
    """The share of the peak rate: linear warm-up, then a cosine to zero; progress in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(args: argparse.Namespace) -> None:
    """Trains for args.steps steps or args.max_minutes, whichever ends first, and writes the averaged model."""
    clouds = Clouds(
        load_pairs(args.out / f"pairs-{args.seed}-{args.clouds}.npy", args.clouds, args.seed), args.tokens, args.seed
    )
    model = new_model(PRESETS["shapes"].config, args.seed)
    average = copy.deepcopy(model).requires_grad_(False)
    network = torch.compile(model, dynamic=True) if args.compile else model
    optimizers = new_optimizers(model, args.lr)
    generator = torch.Generator().manual_seed(args.seed + 1)
    basis = torch.from_numpy(frame()).float()
    started, running, step, progress = time.monotonic(), 0.0, 0, 0.0
    while progress < 1.0:
        set_learning_rate(optimizers, learning_rate(progress, step))
        batch = clouds.draw()
        loss = flow_loss(network, batch, draw_times(len(batch.data), generator), basis)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step)
        step += 1
        elapsed_s = time.monotonic() - started
        progress = max(step / args.steps, elapsed_s / (60 * args.max_minutes))
        running += loss.item()
        if step % 100 == 0:
            log.info("step %d  progress %.3f  loss %.4f  %.3f s/step", step, progress, running / 100, elapsed_s / step)
            running = 0.0
        if step % SAVE_EVERY == 0:
            save_checkpoint(average, args.out / CHECKPOINT_NAME)
    log.info("finished after %d steps, %.1f minutes", step, (time.monotonic() - started) / 60)
    save_checkpoint(average, args.out / CHECKPOINT_NAME)
    write_manifest(args.out / CHECKPOINT_NAME, args, steps=step, minutes=(time.monotonic() - started) / 60)


def write_manifest(checkpoint: Path, args: argparse.Namespace, *, steps: int, minutes: float) -> None:
    """Writes the checkpoint's origin as JSON beside it. evaluate.py --record later adds the quality."""
    script = f"examples/shapes/{Path(sys.argv[0]).name}"
    manifest = {
        "sha256": sha256(checkpoint),
        "command": " ".join(["python", script, f"--steps {steps}", *_options(args)]),
        "seed": args.seed,
        "steps": steps,
        "minutes": round(minutes, 1),
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy")} | {"python": platform.python_version()},
    }
    checkpoint.with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n")


def _options(args: argparse.Namespace) -> list[str]:
    """The options of a command line that give the same weights, in alphabetic order."""
    given = {name.replace("_", "-"): value for name, value in sorted(vars(args).items())}
    kept = {
        name: value
        for name, value in given.items()
        if name not in ("out", "steps", "max-minutes") and value not in (False, None)
    }
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in kept.items()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"), help="folder of the checkpoint and the cached pairs")
    parser.add_argument("--steps", type=int, default=10_400)
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end the cosine after this time if the steps take longer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2048, help="latent tokens per step: clouds x points")
    parser.add_argument("--clouds", type=int, default=128, help="matched clouds per prompt")
    parser.add_argument("--lr", type=float, default=8e-3, help="peak learning rate of Muon")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model: minutes at the start, steps about 20 %% faster"
    )
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # Without torch.compile, RMSNorm in bfloat16 with float32 scales takes a slower kernel and warns at every call.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    train(parse_arguments())


if __name__ == "__main__":
    main()
