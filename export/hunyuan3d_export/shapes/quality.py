"""The quality gate: it measures the samples of any sampling path against exact surfaces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hunyuan3d_client.shapes import decode_points, embed_prompt, out_of_subspace_energy

from ..progress import ComparisonWatch, Silent
from .mesh_quality import MeshQuality
from .metrics import coverage_distance, nearest_prompt, surface_distance
from .prompts import PROMPTS, TRAINED_PROMPTS

Latents = NDArray[np.float32]
# (context [B, T, 1536] float16, initial noise [B, L, 64] float32, guidance scale) -> final latents [B, L, 64] float32
Sample = Callable[[NDArray[np.float16], Latents, float], Latents]
Report = dict[str, Any]

Level = Literal["full", "quick"]
THRESHOLDS = Path(__file__).with_name("thresholds.json")
# A path that ignores the guidance scale or swaps its two branches fails at one or more of these scales.
PROBE_SCALES = (0.0, 1.0, 4.0)
QUICK_PROMPTS = ("cube", "flat torus", "two cones", "two tall tetrahedra")
PROBE_PROMPTS = ("two flat cubes", "two tall cones", "two flat tori", "flat helix")
_PROBE_SEEDS = 2


def initial_noise(seeds: Iterable[int], num_latents: int) -> Latents:
    """Standard normal noise [B, L, 64]; each sample has its own seed."""
    return np.stack([np.random.default_rng(seed).standard_normal((num_latents, 64), np.float32) for seed in seeds])


def draw(sample: Sample, prompt: str, seeds: Sequence[int], *, num_latents: int, guidance_scale: float) -> Latents:
    """Final latents [B, L, 64] of one prompt, one sample per seed."""
    context = np.repeat(embed_prompt(prompt)[None], len(seeds), axis=0)
    return sample(context, initial_noise(seeds, num_latents), guidance_scale)


def measure(latents: Latents, prompt: str) -> dict[str, float]:
    """The metrics of samples [B, L, 64] of one prompt: distances in units of the solid's bounding radius, accuracy in [0, 1]."""
    if not np.isfinite(latents).all():
        return dict.fromkeys(("mean", "p95", "coverage", "energy"), float("inf")) | {"accuracy": 0.0}
    points = decode_points(latents)
    distances = surface_distance(points, prompt)
    return {
        "mean": float(distances.mean()),
        "p95": float(np.percentile(distances, 95)),
        "coverage": float(np.mean([coverage_distance(cloud, prompt).mean() for cloud in points])),
        "accuracy": float(np.mean([nearest_prompt(cloud, PROMPTS) == prompt for cloud in points])),
        "energy": out_of_subspace_energy(latents),
    }


def evaluate(
    sample: Sample,
    prompts: Sequence[str] = TRAINED_PROMPTS,
    seeds: Sequence[int] = range(16),
    *,
    num_latents: int = 256,
    guidance_scale: float,
    reference: Sample | None = None,
    meshes: MeshQuality | None = None,
    watch: ComparisonWatch | None = None,
) -> Report:
    """Draws every prompt with every seed and reports the metrics, per prompt and overall, as plain data.

    PROBE_PROMPTS are drawn again at each of PROBE_SCALES ("probes"). If `reference` is given, it draws them from the same
    noise too, and "deviation" is the median distance between its points and the sampler's, at the worst scale. `meshes` makes
    meshes of the first samples of each prompt ("meshes"). `watch` is told of each prompt; its work is counted in samples.
    """
    watch = watch or Silent()
    _plan(watch, len(prompts), seeds, reference)
    per_prompt = {}
    for prompt in prompts:
        watch.begin(prompt)
        latents = draw(sample, prompt, seeds, num_latents=num_latents, guidance_scale=guidance_scale)
        per_prompt[prompt] = measure(latents, prompt)
        line = _line(prompt, per_prompt[prompt])
        if meshes is not None:
            line += f"; {meshes.add(prompt, latents)}"
        watch.advance(len(seeds))
        watch.finish(line)
    probes, deviation = _probe(sample, seeds[:_PROBE_SEEDS], num_latents, reference, watch)
    return {
        "num_latents": num_latents,
        "guidance_scale": guidance_scale,
        "seeds": len(seeds),
        "overall": _overall(per_prompt) | ({} if deviation is None else {"deviation": deviation}),
        "probes": probes,
        "prompts": per_prompt,
        **({} if meshes is None else {"meshes": meshes.report()}),
    }


def _plan(watch: ComparisonWatch, prompts: int, seeds: Sequence[int], reference: Sample | None) -> None:
    """Tells the watch what is to come: so many prompts, each with every seed, and the probes."""
    probes = len(PROBE_SCALES) * len(PROBE_PROMPTS)
    watch.plan(prompts + probes, prompts * len(seeds) + probes * _samples_of_a_probe(seeds[:_PROBE_SEEDS], reference))


def _samples_of_a_probe(seeds: Sequence[int], reference: Sample | None) -> int:
    return len(seeds) * (1 if reference is None else 2)


def _line(prompt: str, values: dict[str, float]) -> str:
    return f"{prompt}: mean {values['mean']:.3f}, accuracy {values['accuracy']:.2f}"


def _probe(
    sample: Sample, seeds: Sequence[int], num_latents: int, reference: Sample | None, watch: ComparisonWatch
) -> tuple[dict[str, dict[str, float]], float | None]:
    """The metrics of PROBE_PROMPTS at each scale, and the largest deviation from the reference."""
    probes: dict[str, dict[str, float]] = {}
    for scale in PROBE_SCALES:
        rows, distances = {}, []
        for prompt in PROBE_PROMPTS:
            name = f"{prompt} at scale {scale:g}"
            watch.begin(name)
            latents = draw(sample, prompt, seeds, num_latents=num_latents, guidance_scale=scale)
            rows[prompt] = measure(latents, prompt)
            if reference is not None:
                expected = draw(reference, prompt, seeds, num_latents=num_latents, guidance_scale=scale)
                distances.append(np.linalg.norm(decode_points(latents) - decode_points(expected), axis=-1))
            watch.advance(_samples_of_a_probe(seeds, reference))
            watch.finish(_line(name, rows[prompt]))
        # The median ignores outliers: rounding errors grow large in single points and, at high scales, in whole clouds.
        deviation = {"deviation": float(np.median(distances))} if distances else {}
        probes[f"{scale:g}"] = _overall(rows) | deviation
    deviations = [values["deviation"] for values in probes.values() if "deviation" in values]
    return probes, float(np.max(deviations)) if deviations else None


def _overall(per_prompt: dict[str, dict[str, float]]) -> dict[str, float]:
    rows = per_prompt.values()
    overall = {name: float(np.mean([row[name] for row in rows])) for name in ("mean", "p95", "coverage", "accuracy", "energy")}
    return overall | {"worst": max(row["mean"] for row in rows)}


def load_thresholds(level: Level = "full") -> dict[str, Any]:
    """The table of bounds, metric -> {"min": x} or {"max": x}, overall and for the probes at each scale.

    The "full" bounds are for the preset's own number of steps and latents. The "quick" bounds are for 8 steps and 64 latents
    of QUICK_PROMPTS, which tell a broken path from a sound path in seconds.
    """
    return json.loads(THRESHOLDS.read_text())[level]


def failures(report: Report, thresholds: dict[str, Any]) -> list[str]:
    """One line for each bound that the report misses. An empty list means that the path passes."""
    found = _misses("overall", report["overall"], thresholds["overall"])
    for scale, bounds in thresholds["probes"].items():
        found += _misses(f"guidance scale {scale}", report["probes"][scale], bounds)
    if "meshes" in report:
        found += _misses("meshes", report["meshes"]["overall"], thresholds["meshes"])
    return found


def _misses(where: str, values: dict[str, float], bounds: dict[str, dict[str, float]]) -> list[str]:
    found = []
    for metric, bound in bounds.items():
        value = values.get(metric)
        if value is None:
            continue  # a report without a reference has no deviation
        # `not low <= value <= high` is also true for NaN, so NaN fails.
        if not bound.get("min", -np.inf) <= value <= bound.get("max", np.inf):
            found.append(f"{where}: {metric} must be within {bound}, got {value:.4g}")
    return found
