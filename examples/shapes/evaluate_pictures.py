"""Measures pictures -> meshes of the `shapes` preset on a server: python examples/shapes/evaluate_pictures.py --url localhost:8001"""

from __future__ import annotations

import argparse
import json
import logging
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hunyuan3d_client import Client
from hunyuan3d_client.pictures import png
from hunyuan3d_client.shapes import decode_points
from hunyuan3d_export.shapes import PROMPTS, TRAINED_PROMPTS
from hunyuan3d_export.shapes.meshes import Triangles, measure_mesh
from hunyuan3d_export.shapes.metrics import nearest_prompt
from hunyuan3d_export.shapes.render import gridded, picture, random_look, random_view

log = logging.getLogger("evaluate_pictures")
METRICS = ("to_surface", "from_surface", "volume", "watertight", "topology")


def measure(client: Client, prompt: str, views: int, *, resolution: int, seed: int, pixels: int) -> list[dict[str, float]]:
    """One row of metrics for each picture; every other picture has alpha. "right": whether the drawn points fit this prompt best.

    The server gets all pictures of the prompt at once.
    """
    distance = gridded(prompt)

    def row(index: int) -> dict[str, float]:
        random = np.random.default_rng([seed, index, zlib.crc32(prompt.encode())])
        image = picture(distance, random_view(random), random_look(random, alpha=index % 2 == 0), pixels)
        mesh = client.generate(png(image), seed=index, resolution=resolution)
        shape = mesh.to_trimesh()
        assert mesh.latents is not None
        found = nearest_prompt(decode_points(mesh.latents[0]), PROMPTS)
        if found != prompt:
            log.info("%s, view %d: drawn as %s", prompt, index, found)
        metrics = measure_mesh(Triangles(np.asarray(shape.vertices), np.asarray(shape.faces)), prompt)
        return {"right": float(found == prompt), **metrics}

    with ThreadPoolExecutor(views) as pool:
        return list(pool.map(row, range(views)))


def measured(client: Client, prompts: Sequence[str], args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The rows of each prompt. A line is logged when a prompt is done."""
    rows = {}
    for prompt in prompts:
        rows[prompt] = measure(client, prompt, args.views, resolution=args.resolution, seed=args.seed, pixels=args.pixels)
        log.info("%d of %d: %s", len(rows), len(prompts), prompt)
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--views", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=192, help="side of the pictures")
    parser.add_argument("--seed", type=int, default=1000, help="of the views; training takes those of its own seed")
    parser.add_argument("--report", type=Path, help="write all rows there as JSON")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)  # only this script's lines are shown, because the client logs a line for each answer
    args = parse_arguments()
    with Client(args.url, timeout_s=600) as client:
        rows = measured(client, TRAINED_PROMPTS, args)
    flat = [row for each in rows.values() for row in each]
    right = [row for row in flat if row["right"]]
    log.info("%d pictures, right solid %.1f %%", len(flat), 100 * np.mean([row["right"] for row in flat]))
    for name in METRICS:
        values = [row[name] for row in flat if name in row]
        fitting = [row[name] for row in right if name in row]
        log.info(
            "%-13s mean %.4f, median %.4f; of the right solids mean %.4f, largest %.4f",
            name,
            np.mean(values),
            np.median(values),
            np.mean(fitting),
            np.max(fitting),
        )
    if args.report:
        args.report.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
