"""Trains the picture encoder of the `shapes` preset: python examples/shapes/train_encoder.py --out build/shapes"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan3d_client.shapes import embed_prompt
from hunyuan3d_export.conditioner.checkpoint import load_conditioner, save_conditioner
from hunyuan3d_export.conditioner.config import WORDS_IMAGE_SIZE, ConditionerConfig, Words
from hunyuan3d_export.conditioner.model import Conditioner

sys.path.insert(0, str(Path(__file__).parent))
from optimizing import optimize
from views import NOTHING, TOKENS, VOCABULARY, Dresser, load_views

CONFIG = ConditionerConfig(
    hidden_size=128,
    depth=4,
    mlp_ratio=4,
    gated=False,
    image_size=WORDS_IMAGE_SIZE,
    views=1,
    words=Words(tokens=TOKENS, vocabulary=len(VOCABULARY)),
)
ADAMW_LR = 2e-3
CHECKPOINT_NAME = "shapes-encoder.safetensors"
SMOOTHING = 0.02  # keeps the scores of a picture finite in training
# How much larger the written scores are. The softmax then gives one word alone, also where the encoder hesitates: a twentieth of "flat"
# beside NOTHING's zeros would be drawn as "flat". A power of two is exact in float16.
SHARPNESS = 32.0


def new_model(seed: int) -> Conditioner:
    """An encoder with transformers' default initialisation, whose words are those of the prompts."""
    torch.manual_seed(seed)
    model = Conditioner(CONFIG, attention="eager")  # quicker than `sdpa` in bfloat16 on a CPU
    assert model.head is not None
    with torch.no_grad():
        for name, value in model.dinov2.named_parameters():
            if name.endswith("lambda1"):
                value.fill_(1.0)
        model.head.vectors.zero_()
        for vector, word in zip(model.head.vectors, VOCABULARY, strict=True):
            if word != NOTHING:
                vector.copy_(torch.from_numpy(embed_prompt(word)[0]))
    return model


def new_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, at `lr`, and AdamW for everything else that is trained."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    matrices = [value for name, value in trained.items() if value.ndim == 2 and ".layer." in name]
    others = [value for name, value in trained.items() if not (value.ndim == 2 and ".layer." in name)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def scores(model: Conditioner, pixels: Tensor) -> Tensor:
    """The score of each word for pixels [B, 1, 3, P, P], [B, TOKENS, words]."""
    assert model.head is not None
    with torch.autocast(pixels.device.type, torch.bfloat16):
        cls = model.hidden(pixels)[:, 0, 0]
    return model.head.scores(cls.float())


def loss_of(model: Conditioner, pixels: Tensor, words: Tensor) -> Tensor:
    """Mean cross entropy of the words [B, TOKENS]."""
    return F.cross_entropy(scores(model, pixels).flatten(0, 1), words.flatten(), label_smoothing=SMOOTHING)


def sharpened(model: Conditioner, factor: float) -> Conditioner:
    """A copy of the model whose scores are `factor` times as large."""
    copied = copy.deepcopy(model)
    assert copied.head is not None
    with torch.no_grad():
        for value in copied.head.choice.parameters():
            value.mul_(factor)
    return copied


def train(args: argparse.Namespace) -> None:
    """Trains for args.steps steps or args.max_minutes, whichever ends first, and writes the averaged model."""
    pictures, words = load_views(args.out / "views", args.views, args.seed)
    dresser, generator = Dresser(args.seed), torch.Generator().manual_seed(args.seed + 1)
    model = new_model(args.seed)
    if args.resume is not None:
        known = load_conditioner(args.resume, image_size=CONFIG.image_size, views=CONFIG.views)
        model.load_state_dict(sharpened(known, 1 / SHARPNESS).state_dict())
    optimizers = new_optimizers(model, args.lr)

    def loss_at(_: float) -> Tensor:
        rows = torch.randint(len(pictures), (args.batch,), generator=generator)
        return loss_of(model, dresser.pixels(pictures[rows]), words[rows])

    def save(average: Conditioner, path: Path) -> None:
        save_conditioner(sharpened(average, SHARPNESS), path)

    optimize(args, model, optimizers, loss_at, args.out / CHECKPOINT_NAME, save)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"), help="folder of the checkpoint and the cached views")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end the cosine after this time if the steps take longer"
    )
    parser.add_argument("--resume", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--views", type=int, default=100, help="views of each prompt")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of Muon")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parse_arguments())


if __name__ == "__main__":
    main()
