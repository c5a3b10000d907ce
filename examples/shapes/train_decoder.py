"""Trains the shape decoder of the `shapes` preset: python examples/shapes/train_decoder.py --out build/shapes"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan3d_client.shapes import frame
from hunyuan3d_export.shapevae import PRESETS, ShapeVAEDecoder, load_checkpoint, save_checkpoint
from hunyuan3d_export.shapevae.model import fourier_features, precise

sys.path.insert(0, str(Path(__file__).parent))
from fields import Batch, Fields, load_banks
from optimizing import optimize

PRESET = PRESETS["shapes"]
ADAMW_LR = 2e-3
CHECKPOINT_NAME = "shapes-decoder.safetensors"
LEAST_JITTER = 0.4  # the share of the noise that is left at the end
_FIRST_AND_LAST = ("post_kl", "query_proj", "output_proj")


def new_model(seed: int) -> ShapeVAEDecoder:
    """A decoder with torch's default initialisation, except for its first layers, hidden layers and attention.

    The first layer of the latents reads only the three directions that carry the points. In the first layer of the queries,
    the weights of a frequency fall with its square root, so that the first fields are smooth. Larger weights make the hidden
    layers less linear and attention sharper from the start.
    """
    torch.manual_seed(seed)
    model = ShapeVAEDecoder(PRESET.config, include_pi=PRESET.include_pi)
    geometry = model.geo_decoder
    with torch.no_grad():
        directions = torch.from_numpy(frame()).float()  # [3, 64]
        model.post_kl.weight.copy_(2.0 * torch.randn(PRESET.config.width, 3) @ directions)
        model.post_kl.bias.normal_()
        falling = geometry.frequencies.repeat(6).rsqrt()  # sines and cosines of three coordinates
        geometry.query_proj.weight[:, 3:] *= falling
        geometry.query_proj.weight[:, :3] *= 8.0
        for name, value in model.named_parameters():
            if name.endswith("c_fc.weight"):
                value *= 3.0
            elif name.startswith("geo_decoder") and name.endswith(("q_norm.weight", "k_norm.weight")):
                value *= 2.0
    return model


def new_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the first and the last layers, at `lr`, and AdamW for everything else."""
    inner = {
        name: value
        for name, value in model.named_parameters()
        if value.ndim == 2 and not any(part in name for part in _FIRST_AND_LAST)
    }
    others = [value for name, value in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon([*inner.values()], lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def field(model: ShapeVAEDecoder, latents: Tensor, queries: Tensor) -> Tensor:
    """The decoder's field at queries [B, P, 3] of latents [B, L, 64], [B, P]; inner layers in bfloat16, the outer ones in float32."""
    geometry, backend = model.geo_decoder, model.attention_backend
    x = precise(geometry.query_proj, fourier_features(queries, geometry.frequencies))
    with torch.autocast(latents.device.type, torch.bfloat16):
        k, v = model.keys_values(latents / PRESET.scale_factor)
        x = geometry.cross_attn_decoder(x, k, v, backend)
    return precise(geometry.output_proj, geometry.ln_post(x.float())).squeeze(-1)


def loss_of(model: ShapeVAEDecoder, batch: Batch) -> Tensor:
    """Mean absolute error of the field."""
    return (field(model, batch.latents, batch.queries) - batch.field).abs().mean()


def train(args: argparse.Namespace) -> None:
    """Trains for args.steps steps or args.max_minutes, whichever ends first, and writes the averaged model."""
    banks = load_banks(args.out / "banks", args.seed)
    fields = Fields(banks, tokens=args.tokens, queries=args.queries, near_share=args.near_share, seed=args.seed)
    model = new_model(args.seed)
    if args.resume is not None:
        model = load_checkpoint(args.resume, dtype=torch.float32).requires_grad_(True).train()
    optimizers = new_optimizers(model, args.lr)

    def loss_at(progress: float) -> Tensor:
        return loss_of(model, fields.draw(1 - (1 - LEAST_JITTER) * progress))

    optimize(args, model, optimizers, loss_at, args.out / CHECKPOINT_NAME, save_checkpoint)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"), help="folder of the checkpoint and the cached banks")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end the cosine after this time if the steps take longer"
    )
    parser.add_argument("--resume", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2048, help="latent tokens per step: clouds x points")
    parser.add_argument("--queries", type=int, default=4096, help="points of space per step")
    parser.add_argument("--near-share", type=float, default=0.6, help="share of the queries that lie near the surface")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of Muon")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parse_arguments())


if __name__ == "__main__":
    main()
