"""What a mesh costs: evaluations, seconds beside the field and memory, beside dense marching cubes and upstream's decoders.

    python bench/mesh.py                      the chair at 384 in all ways, then the scaling with the resolution
    python bench/mesh.py follow chair 384     one measurement, as JSON; each is made in a process of its own

The fields are analytic, so that the field's own time does not matter. Seconds are of the processor, in one thread, which other
programs disturb less; the time of the field is left out. Memory is the peak above what the process held before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
for folder in ("model_repository/hunyuan3d_mesh/1", "tests/mesh"):
    sys.path.insert(0, str(ROOT / folder))

import cleaning  # noqa: E402
import fields  # noqa: E402
import mesh_files  # noqa: E402
from skimage.measure import marching_cubes  # noqa: E402
from surface import extract  # noqa: E402

Field = Callable[[np.ndarray], np.ndarray]
RESOLUTIONS = (128, 256, 384, 512, 1024)
_CHUNK = 2**14
_LEAST = 63  # upstream halves the resolution while it is at least this
_SATURATED = 0.95


def field_named(name: str, resolution: int) -> Field:
    """One of tests/mesh/fields.py, evaluated in small pieces, so that it takes little memory."""
    whole = fields.chair(resolution) if name == "chair" else getattr(fields, name)

    def field(points: np.ndarray) -> np.ndarray:
        values = np.empty(len(points), np.float32)
        for first in range(0, len(points), _CHUNK):
            values[first : first + _CHUNK] = whole(points[first : first + _CHUNK])
        return values

    return field


def follow(field: Field, resolution: int) -> dict[str, float]:
    """Our decoder, down to the bytes of a GLB."""
    begin, in_field = time.process_time(), 0.0
    asking = extract(resolution)
    queries = next(asking)
    try:
        while True:
            before = time.process_time()
            values = field(queries)
            in_field += time.process_time() - before
            queries = asking.send(values)
    except StopIteration as end:
        surface = end.value
    cleaned = cleaning.clean(surface.vertices, surface.faces, shape=surface.topology)
    mesh_files.encode(cleaned.vertices, cleaned.faces, "glb")
    statistics = surface.statistics
    seconds = time.process_time() - begin - in_field
    return {"evaluations": statistics.evaluations, "waves": statistics.waves, "faces": len(cleaned.faces), "seconds": seconds}


def dense(field: Field, resolution: int) -> dict[str, float]:
    """Every point of the grid, then scikit-image: its time alone."""
    values = volume(field, resolution)
    begin = time.process_time()
    _, faces, _, _ = marching_cubes(values, 0.0)
    return {"evaluations": values.size, "waves": 1, "faces": len(faces), "seconds": time.process_time() - begin}


def volume(field: Field, resolution: int) -> np.ndarray:
    """The values of every point of the grid."""
    line = np.linspace(-fields.BOUNDS, fields.BOUNDS, resolution + 1).astype(np.float32)
    layer = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    values = np.empty((resolution + 1,) * 3, np.float32)
    for index, x in enumerate(line):
        values[index] = field(np.insert(layer, 0, x, axis=1)).reshape(values.shape[1:])
    return values


def time_ratio(shape: str, resolution: int, repeats: int = 5) -> float:
    """Our seconds beside the field, relative to dense marching cubes alone: the fastest of runs that take turns."""
    field = field_named(shape, resolution)
    values = volume(field, resolution)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(follow(field, resolution)["seconds"])
        begin = time.process_time()
        marching_cubes(values, 0.0)
        theirs.append(time.process_time() - begin)
    return min(ours) / min(theirs)


def hierarchical(field: Field, resolution: int) -> dict[str, float]:
    """The points that upstream's hierarchical decoder chooses, at their right places."""
    return _upstream(field, _halved(resolution))


def flashvdm(field: Field, resolution: int) -> dict[str, float]:
    """The points that upstream's FlashVDM decoder chooses; its grid is coarser than asked for."""
    levels = len(_halved(resolution))
    first = round(_halved(resolution)[0] / 4) * 4 - 1
    return _upstream(field, [first * 2**level for level in range(levels)])


def _halved(resolution: int) -> list[int]:
    halved = [resolution]
    while halved[0] // 2 >= _LEAST:
        halved.insert(0, halved[0] // 2)
    return halved


def _upstream(field: Field, resolutions: list[int]) -> dict[str, float]:
    """Points near sign changes and unsaturated ones, grown by a point before and once or twice after each doubling."""
    chosen = np.ones((resolutions[0] + 1,) * 3, bool)
    evaluations = 0
    for index, resolution in enumerate(resolutions):
        values = np.full(chosen.shape, np.nan, np.float32)
        values[chosen] = np.concatenate([field(part) for part in _points(resolution, chosen)])
        evaluations += int(chosen.sum())
        if index + 1 == len(resolutions):
            break
        last = index + 2 == len(resolutions)
        near = _beside_other_sign(values) | (np.abs(values) < _SATURATED)
        near = near if last else _grown(near)
        size = resolutions[index + 1] + 1
        chosen = np.zeros((size,) * 3, bool)
        x, y, z = (2 * places for places in np.nonzero(near))
        inner = (x < size) & (y < size) & (z < size)
        chosen[x[inner], y[inner], z[inner]] = True
        chosen = _grown(_grown(chosen)) if last else _grown(chosen)
    return {"evaluations": evaluations, "waves": len(resolutions), "resolution": resolutions[-1]}


def _points(resolution: int, chosen: np.ndarray) -> list[np.ndarray]:
    line = np.linspace(-fields.BOUNDS, fields.BOUNDS, resolution + 1).astype(np.float32)
    layers = (np.argwhere(layer) for layer in chosen)
    return [np.insert(line[places], 0, x, axis=1) for x, places in zip(line, layers, strict=True)]


def _beside_other_sign(values: np.ndarray) -> np.ndarray:
    signs = np.sign(values)
    beside = np.zeros(values.shape, bool)
    for axis in range(3):
        first, second = (np.moveaxis(signs, axis, 0)[part] for part in (slice(None, -1), slice(1, None)))
        other = (first != second) & ~np.isnan(first) & ~np.isnan(second)
        for part in (slice(None, -1), slice(1, None)):
            np.moveaxis(beside, axis, 0)[part] |= other
    return beside


def _grown(mask: np.ndarray) -> np.ndarray:
    for axis in range(3):
        before = np.moveaxis(mask, axis, 0)
        mask = mask.copy()
        np.moveaxis(mask, axis, 0)[1:] |= before[:-1]
        np.moveaxis(mask, axis, 0)[:-1] |= before[1:]
    return mask


WAYS = {"follow": follow, "dense": dense, "hierarchical": hierarchical, "flashvdm": flashvdm}


def measure(way: str, shape: str, resolution: int) -> dict[str, float]:
    """In this process: the figures of a way, with the peak memory in MB."""
    field = field_named(shape, resolution)
    follow(field_named("sphere", 16), 16)  # loads what is loaded on first use
    before = psutil.Process().memory_info().rss
    figures = WAYS[way](field, resolution)
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {**figures, "peak_mb": max(peak - before, 0) / 1e6}


def measured(way: str, shape: str, resolution: int) -> dict[str, float]:
    """As measure, in a process of its own."""
    command = [sys.executable, __file__, way, shape, str(resolution)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def main() -> None:
    console = Console()
    table = Table("way", "field", "R", "evaluations", "share of dense", "waves", "seconds beside the field", "peak MB")
    runs = [(way, "chair", 384) for way in WAYS] + [("follow", "sphere", resolution) for resolution in RESOLUTIONS]
    for way, shape, resolution in runs:
        figures = measured(way, shape, resolution)
        share = f"1/{(resolution + 1) ** 3 / figures['evaluations']:.0f}"
        seconds = f"{figures['seconds']:.2f}" if "seconds" in figures else ""
        numbers = [f"{figures['evaluations']:,}", share, str(figures["waves"]), seconds, f"{figures['peak_mb']:.0f}"]
        table.add_row(way, shape, str(int(figures.get("resolution", resolution))), *numbers)
    console.print(table)
    console.print(f"seconds relative to dense marching cubes alone, taking turns: {time_ratio('chair', 384):.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.stdout.write(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main()
