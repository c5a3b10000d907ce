"""What the three training scripts share: steps until the time is over, the averaged model, its file and its manifest."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from hunyuan3d_export.files import sha256

log = logging.getLogger("train")

EMA_DECAY = 0.999
WARMUP_STEPS = 200
SAVE_EVERY = 500

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Updates the exponential moving average of the weights. The decay is smaller in the first steps."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets the rate of every parameter group to `factor` times its initial rate."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


def learning_rate(progress: float, step: int) -> float:
    """The share of the peak rate: linear warm-up, then a cosine to zero; progress in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def optimize(
    args: argparse.Namespace,
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    loss_at: Callable[[float], Tensor],
    checkpoint: Path,
    save: Callable[[Model, Path], object],
) -> None:
    """Takes args.steps steps, or those of args.max_minutes if they end first, and writes the averaged model and its manifest.

    loss_at: draws a batch and gives its loss; it is told the share of the training that is done, 0 to 1.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    started, running, step, progress = time.monotonic(), 0.0, 0, 0.0
    while progress < 1.0:
        set_learning_rate(optimizers, learning_rate(progress, step))
        loss = loss_at(progress)
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
            save(average, checkpoint)
    minutes = (time.monotonic() - started) / 60
    log.info("finished after %d steps, %.1f minutes", step, minutes)
    save(average, checkpoint)
    write_manifest(checkpoint, args, steps=step, minutes=minutes)


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
