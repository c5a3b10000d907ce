"""The part of the quality gate that measures meshes: it decodes samples of any path and compares them with the exact solids."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .meshes import BOUNDS, Decode, Latents, Triangles, distance_to_mesh, measure_mesh

_MEANS = ("to_surface", "from_surface", "watertight", "topology")


class MeshQuality:
    """Collects the meshes of a path. seeds: how many samples of each prompt are decoded; at_once: by so many threads.

    reference: decodes the same latents; "deviation" is then the mean distance of the path's vertices to the reference's mesh, in
    cells of the reference's grid, which has `cells` along each side.
    """

    def __init__(
        self, decode: Decode, *, seeds: int, reference: Decode | None = None, cells: int = 64, at_once: int = 1
    ) -> None:
        self._decode, self._reference = decode, reference
        self._seeds, self._cell, self._at_once = seeds, 2 * BOUNDS / cells, at_once
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._deviations: list[float] = []

    def add(self, prompt: str, latents: Latents) -> str:
        """Decodes the first samples of latents [B, L, 64] of a prompt. Returns a line about them."""

        def measured(each: Latents) -> tuple[Triangles | None, dict[str, float]]:
            mesh = self._decode(each) if np.isfinite(each).all() else None
            return mesh, measure_mesh(mesh, prompt)

        with ThreadPoolExecutor(self._at_once) as pool:
            meshes, rows = zip(*pool.map(measured, latents[: self._seeds]), strict=True)
        self._rows.setdefault(prompt, []).extend(rows)
        if self._reference is not None:
            self._deviations.append(_deviation(meshes[0], self._reference(latents[0])) / self._cell)
        values = _mean(list(rows))
        return f"meshes: to surface {values['to_surface']:.3f}, volume off by {values['volume']:.1%}"

    def report(self) -> dict[str, Any]:
        """The metrics of each prompt's meshes, and of all. "worst" and "worst_from": of the prompts' mean distances."""
        prompts = {prompt: _mean(rows) for prompt, rows in self._rows.items()}
        rows = [row for each in self._rows.values() for row in each]
        found = {name: [row[name] for row in rows if name in row] for name in _MEANS}
        overall = {name: float(np.mean(values)) for name, values in found.items() if values}
        overall |= {
            "volume": float(np.median([row["volume"] for row in rows])),
            "worst": max(values["to_surface"] for values in prompts.values()),
            "worst_from": max(values["from_surface"] for values in prompts.values()),
        }
        if self._deviations:
            overall["deviation"] = float(np.mean(self._deviations))
        return {"seeds": self._seeds, "overall": overall, "prompts": prompts}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _deviation(found: Triangles | None, expected: Triangles | None) -> float:
    """Mean distance of the found vertices to the expected mesh; 0 where both fields have no surface."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return float(distance_to_mesh(found.vertices, expected).mean())
