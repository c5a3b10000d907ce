"""The pictures of docs/: the galleries of clouds and meshes, quality by number of steps, quality by guidance scale."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hunyuan3d_client.shapes import decode_points
from hunyuan3d_client.shapes.pictures import save_grid
from hunyuan3d_export.dit import PRESETS, Hunyuan3DDiT
from hunyuan3d_export.shapes import HELD_OUT, PROMPTS, TRAINED_PROMPTS
from hunyuan3d_export.shapes.decoding import Decoder
from hunyuan3d_export.shapes.gate import torch_decoder
from hunyuan3d_export.shapes.mesh_pictures import save_meshes
from hunyuan3d_export.shapes.quality import draw, measure
from hunyuan3d_export.shapes.reference import torch_sampler

SHAPES = PRESETS["shapes"]
STEPS = (2, 4, 8, 16, 50)
SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MESH_RESOLUTION = 64
METRICS = ("mean", "p95", "coverage", "accuracy", "energy")
CURVE_SEEDS = range(100, 102)
CURVE_PROMPTS = TRAINED_PROMPTS[::4]  # a quarter of the prompts, so that a curve takes minutes instead of an hour on two cores


def draw_all(model: Hunyuan3DDiT, folder: Path) -> None:
    """Writes shapes.png, shapes-meshes.png, quality-steps.png, quality-guidance.png and the curves' numbers, quality.json."""
    folder.mkdir(parents=True, exist_ok=True)
    gallery(model, folder / "shapes.png")
    mesh_gallery(model, folder / "shapes-meshes.png")
    steps = {n: quality(model, n, SHAPES.guidance_scale) for n in STEPS}
    scales = {s: quality(model, SHAPES.steps, s) for s in sorted({*SCALES, SHAPES.guidance_scale})}
    curve(steps, "Euler steps", folder / "quality-steps.png")
    curve(scales, "guidance scale", folder / "quality-guidance.png")
    (folder / "quality.json").write_text(json.dumps({"steps": steps, "guidance_scale": scales}, indent=1) + "\n")


def gallery(model: Hunyuan3DDiT, path: Path) -> None:
    """Draws one sample of 1024 points for every prompt. A star marks the prompts that were held out of training."""
    sample = torch_sampler(model, guidance="guided")
    drawn = functools.partial(draw, sample, seeds=[0], num_latents=1024, guidance_scale=SHAPES.guidance_scale)
    clouds = {prompt: decode_points(drawn(prompt)[0]) for prompt in PROMPTS}
    save_grid(clouds, path, titles={prompt: f"{prompt} *" for prompt in HELD_OUT})


def mesh_gallery(model: Hunyuan3DDiT, path: Path) -> None:
    """Draws the mesh of one sample for every prompt. A star marks the prompts that were held out of training."""
    sample = torch_sampler(model, guidance="guided")
    decode = Decoder(torch_decoder(), MESH_RESOLUTION)
    meshes = {}
    for prompt in PROMPTS:
        latents = draw(sample, prompt, [0], num_latents=SHAPES.num_latents, guidance_scale=SHAPES.guidance_scale)
        mesh = decode(latents[0])
        if mesh is not None:
            meshes[prompt] = mesh
    save_meshes(meshes, path, pixels=110, titles={prompt: f"{prompt} *" for prompt in HELD_OUT})


def quality(model: Hunyuan3DDiT, steps: int, scale: float) -> dict[str, float]:
    """The metrics, averaged over CURVE_PROMPTS with 2 seeds each."""
    sample = torch_sampler(model, steps=steps, guidance="guided")
    drawn = functools.partial(draw, sample, seeds=CURVE_SEEDS, num_latents=SHAPES.num_latents, guidance_scale=scale)
    rows = [measure(drawn(prompt), prompt) for prompt in CURVE_PROMPTS]
    return {name: float(np.mean([row[name] for row in rows])) for name in METRICS}


def curve(results: dict[float, dict[str, float]], label: str, path: Path) -> None:
    """Plots distances and accuracy over the setting named by `label`."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    distances, accuracy = figure.subplots(1, 2)
    for name in ("mean", "p95", "coverage"):
        distances.plot(list(results), [row[name] for row in results.values()], marker="o", label=name)
    accuracy.plot(list(results), [row["accuracy"] for row in results.values()], marker="o", color="black")
    distances.set(xlabel=label, ylabel="distance (bounding radius 1)", yscale="log")
    distances.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    distances.minorticks_off()
    accuracy.set(xlabel=label, ylabel="prompt accuracy", ylim=(0, 1.05))
    if label == "Euler steps":
        for axes in (distances, accuracy):
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(results), [str(n) for n in results])
            axes.minorticks_off()
    distances.legend(loc="upper right")
    figure.savefig(path, dpi=100)
