"""Measures a checkpoint of the `shapes` preset: python examples/shapes/evaluate.py [--checkpoint F] [--report F] [--docs FOLDER]"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from hunyuan3d_export.dit import PRESETS, load_checkpoint
from hunyuan3d_export.shapes import CHECKPOINT, HELD_OUT, PROMPTS, TRAINED_PROMPTS
from hunyuan3d_export.shapes.quality import evaluate, failures, load_thresholds
from hunyuan3d_export.shapes.reference import torch_sampler

sys.path.insert(0, str(Path(__file__).parent))
import plots
import torch

log = logging.getLogger("evaluate")


def as_table(report: dict) -> str:
    """The report's numbers for a terminal, worst prompts last."""
    names = ("mean", "p95", "coverage", "accuracy", "energy")
    rows = sorted(report["prompts"].items(), key=lambda row: row[1]["mean"]) + [("overall", report["overall"])]
    rows += [(f"scale {scale}", values) for scale, values in report["probes"].items()]
    lines = [f"{'':24}" + "".join(f"{name:>10}" for name in names)]
    lines += [f"{prompt:24}" + "".join(f"{values[name]:10.4f}" for name in names) for prompt, values in rows]
    return "\n".join(lines)


def record(report: dict, manifest: Path) -> None:
    """Adds the report's overall numbers to the checkpoint's manifest."""
    known = json.loads(manifest.read_text())
    quality = {name: report[name] for name in ("num_latents", "guidance_scale", "seeds")}
    quality["overall"] = {name: round(value, 5) for name, value in report["overall"].items()}
    manifest.write_text(json.dumps({**known, "quality": quality}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--guidance", choices=("two-batch", "guided"), default="guided")
    parser.add_argument("--steps", type=int, default=PRESETS["shapes"].steps)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--num-latents", type=int, default=PRESETS["shapes"].num_latents)
    parser.add_argument("--guidance-scale", type=float, default=PRESETS["shapes"].guidance_scale)
    parser.add_argument("--prompts", choices=("trained", "held-out", "all"), default="trained")
    parser.add_argument("--report", type=Path, help="write the report there as JSON")
    parser.add_argument("--record", action="store_true", help="add the overall numbers to the manifest beside the checkpoint")
    parser.add_argument("--docs", type=Path, help="also draw the gallery and the curves into this folder")
    return parser.parse_args()


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    model = load_checkpoint(args.checkpoint, dtype=torch.float32)
    prompts = {"trained": TRAINED_PROMPTS, "held-out": HELD_OUT, "all": PROMPTS}[args.prompts]
    report = evaluate(
        torch_sampler(model, steps=args.steps, guidance=args.guidance),
        prompts,
        range(args.seeds),
        num_latents=args.num_latents,
        guidance_scale=args.guidance_scale,
        reference=torch_sampler(model, steps=args.steps),
    )
    log.info("%s", as_table(report))
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    if args.record:
        record(report, args.checkpoint.with_suffix(".json"))
    if args.docs:
        plots.draw_all(model, args.docs)
    missed = failures(report, load_thresholds())
    for line in missed:
        log.error("%s", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
