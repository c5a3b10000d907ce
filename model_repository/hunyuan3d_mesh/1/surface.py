"""The surface of a field, followed from a coarse grid down to the fine one, without input or output.

A caller drives the generator: it gets points, evaluates the field there by whatever means, and sends the values back.

1. The coarse grid is evaluated whole. Its points are points of all finer grids too.
2. On each finer level the middles of edges whose ends lie on different sides are evaluated first. A surface that crosses an edge
   is therefore never lost on the way down. Where values only come near to the level, the nearest point is looked for too.
3. Then all corners of cells that have corners on both sides are evaluated, until no such cell lacks a corner.
4. The cells of the last level are those from which marching cubes makes triangles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Literal

import cubes
import numpy as np
import topology
import words
from bricks import AROUND, EDGE, SIZE, Bricks
from failures import EmptyField, FullField, NotFinite, TooManyEvaluations
from guess import Guess
from words import CORNERS

LEAST_RESOLUTION, MOST_RESOLUTION = 8, 1024
METHODS = ("follow", "dense")
Queries = Generator[np.ndarray, np.ndarray, "Surface"]
Progress = Callable[[int, int, int], None]
_COARSE = 48  # cells of the coarse grid along an axis, at least
_NEAR = 0.95  # the network's values are about 1 or -1 away from the surface
_WAVE = 2**20  # points of a wave at most: 12 MB of queries


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Figures of one extraction.

    evaluations: points at which the field was evaluated, each once; by level from coarse to fine. waves: how often the caller was
    asked. cells: those with a piece of the surface. components: connected parts. watertight: every edge has two triangles.
    closed_at_box: whether the surface ran through the box and was closed there.
    """

    evaluations: int
    evaluations_by_level: tuple[int, ...]
    waves: int
    cells: int
    components: int
    watertight: bool
    closed_at_box: bool


@dataclasses.dataclass(frozen=True)
class Surface:
    """A mesh: vertices [V, 3] float32 in the box's coordinates, faces [F, 3] int32, counter-clockwise seen from outside."""

    vertices: np.ndarray
    faces: np.ndarray
    statistics: Statistics
    topology: topology.Topology = dataclasses.field(repr=False)


def extract(
    resolution: int,
    *,
    bounds: float = 1.01,
    level: float = 0.0,
    method: Literal["follow", "dense"] = "follow",
    coarse: int | None = None,
    closed: bool = True,
    max_evaluations: int | None = None,
    progress: Progress | None = None,
) -> Queries:
    """Yields queries [P, 3] float32, is sent the field's values [P] (positive inside), and returns the Surface.

    The fine grid has resolution cells along each axis of the box [-bounds, bounds]. coarse: the coarse grid has at least so many
    (default 48), or half of resolution if that is less; parts that fall between its points can be missed, and method "dense" evaluates every point instead. closed:
    whether a surface that runs through the box is closed there. progress(level, levels, evaluations) is called before each wave.

    Raises ValueError for arguments, NotFinite, EmptyField, FullField and TooManyEvaluations (all FieldErrors) for fields.
    """
    _check(resolution, bounds, level, method, coarse, max_evaluations)
    level = float(np.float32(level))  # values are compared in float32
    halvings = 0 if method == "dense" else _halvings(resolution, _COARSE if coarse is None else coarse)
    asking = _Asking(resolution, bounds, halvings + 1, max_evaluations, progress)
    stride = 2**halvings
    points = -(-(resolution + 2) // stride) + 1
    bricks = Bricks(resolution, stride=stride, points=points, level=level)
    yield from _whole(bricks, asking)
    seeds = _seeds(bricks)
    asking.check_sides(level, unless=len(seeds) > 0)
    while bricks.stride > 1:
        middles = np.concatenate([_middles(bricks), (2 * seeds[:, None] + AROUND).reshape(-1, 3)])
        points = 2 * points - 1
        bricks = Bricks(resolution, stride=bricks.stride // 2, points=points, level=level, parent=bricks)
        yield from _refined(bricks, middles, asking)
        seeds = _nearer(bricks, seeds)
    asking.check_sides(level)
    bricks.parent = None  # frees the coarser levels
    return _surface(bricks, asking, bounds, closed)


def _surface(bricks: Bricks, asking: _Asking, bounds: float, closed: bool) -> Surface:
    """The result, from the finest level."""
    vertices, faces, cells, closed_at_box = cubes.triangles(bricks, closed=closed)
    shape = topology.measure(faces, len(vertices))
    statistics = Statistics(
        evaluations=sum(asking.by_level),
        evaluations_by_level=tuple(asking.by_level),
        waves=asking.waves,
        cells=cells,
        components=shape.components,
        watertight=shape.watertight,
        closed_at_box=closed_at_box,
    )
    return Surface(cubes.in_box(vertices, bricks.resolution, bounds), faces, statistics, shape)


def _halvings(resolution: int, coarse: int) -> int:
    halvings = 1
    while resolution >= coarse * 2 ** (halvings + 1):
        halvings += 1
    return halvings


def _whole(bricks: Bricks, asking: _Asking) -> Generator[np.ndarray, np.ndarray, None]:
    """Evaluates every point of the level."""
    everywhere = np.stack(np.meshgrid(*[np.arange(bricks.across)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    bricks.ensure(everywhere)
    unknown = np.flatnonzero(bricks.bytes()[1:] == 0) + SIZE
    for first in range(0, len(unknown), _WAVE):
        yield from asking.ask(bricks, unknown[first : first + _WAVE])
    for first in range(1, bricks.count, 4096):  # marks the mixed cells
        bricks.missing(np.arange(first, min(first + 4096, bricks.count)))


def _refined(bricks: Bricks, middles: np.ndarray, asking: _Asking) -> Generator[np.ndarray, np.ndarray, None]:
    """Evaluates the points of a new level: the middles [M, 3] first, then the corners that mixed cells lack."""
    asking.next_level()
    for step in (-1, 0, 1):  # the ends of the edges too: what the parent knows of them counts only in bricks that exist
        bricks.ensure((middles + step) >> 3)
    yield from _close(bricks, bricks.unknown(middles), asking)


def _close(bricks: Bricks, unknown: np.ndarray, asking: _Asking) -> Generator[np.ndarray, np.ndarray, None]:
    """Evaluates the points `unknown`, then the corners that mixed cells lack, until none lacks one."""
    examined = 1  # bricks from this one on have not been examined yet; their parents' values may already make mixed cells
    guess = Guess(bricks)
    while True:
        if len(unknown):
            yield from asking.ask(bricks, unknown)
        changed = np.union1d(unknown >> 9, np.arange(examined, bricks.count))
        if not len(changed):
            return
        examined = bricks.count
        unknown = guess.with_points_ahead(bricks.missing(changed), sum(asking.by_level))


def _middles(bricks: Bricks) -> np.ndarray:
    """The middles [M, 3] of edges whose ends lie on different sides, as grid indices of the next level."""
    rows = np.arange(1, bricks.count)
    corners = dict(zip(map(tuple, CORNERS), words.corners(bricks.flags, bricks.neighbours(rows)), strict=True))
    middles = []
    for axis in np.eye(3, dtype=np.int64):
        either = corners[0, 0, 0] | corners[tuple(axis)]
        middles.append(2 * bricks.grid(words.addresses(words.both(either), rows)) + axis)
    return np.concatenate(middles)


def _seeds(bricks: Bricks) -> np.ndarray:
    """Coarse points [S, 3] near which a part may lie that no coarse edge crosses.

    Their values are not saturated and nearer to the level than those of the six neighbours, yet no neighbour is on the other side.
    """
    blocks = bricks.values[1 : bricks.count].reshape((bricks.across,) * 3 + (EDGE,) * 3) - np.float32(bricks.level)
    values = blocks.transpose(0, 3, 1, 4, 2, 5).reshape((EDGE * bricks.across,) * 3)
    last = (bricks.resolution + 1) // bricks.stride
    here = values[1 : last + 1, 1 : last + 1, 1 : last + 1]
    nearest = np.abs(here + np.float32(bricks.level)) < _NEAR  # the network saturates at about 1, whatever the level
    for axis in range(3):
        for side in (-1, 1):
            other = np.roll(values, side, axis)[1 : last + 1, 1 : last + 1, 1 : last + 1]
            nearest &= (np.abs(here) <= np.abs(other)) & ((here > 0) == (other > 0))
    return np.argwhere(nearest) + 1


def _nearer(bricks: Bricks, seeds: np.ndarray) -> np.ndarray:
    """The points [S, 3] of this level next to the parent's seeds [S, 3] with values nearest to the level.

    A seed ends where its neighbourhood [27] has both sides: from there on the surface itself is followed.
    """
    around = 2 * seeds[:, None] + AROUND
    values = bricks.values.reshape(-1)[bricks.addresses(around)] - np.float32(bricks.level)
    nearest = np.abs(values).argmin(axis=1)
    one_sided = (values > 0).all(axis=1) | (values <= 0).all(axis=1)
    return np.unique(around[np.arange(len(seeds)), nearest][one_sided], axis=0)


class _Asking:
    """Counts evaluations and waves, and checks what is asked and what is answered."""

    def __init__(self, resolution: int, bounds: float, levels: int, allowed: int | None, progress: Progress | None) -> None:
        self._line = np.linspace(-bounds, bounds, resolution + 1).astype(np.float32)
        self._levels, self._allowed, self._progress = levels, allowed, progress
        self._inside = self._outside = 0
        self.by_level = [0]
        self.waves = 0

    def next_level(self) -> None:
        self.by_level.append(0)

    def ask(self, bricks: Bricks, addresses: np.ndarray) -> Generator[np.ndarray, np.ndarray, None]:
        """One wave: evaluates the unknown points at `addresses` [P]."""
        total = sum(self.by_level) + len(addresses)
        if self._allowed is not None and total > self._allowed:
            raise TooManyEvaluations(total, self._allowed)
        if self._progress is not None:
            self._progress(len(self.by_level) - 1, self._levels, sum(self.by_level))
        self.by_level[-1] += len(addresses)
        self.waves += 1
        queries = self._line[bricks.grid(addresses) * bricks.stride - 1]
        values = np.asarray((yield queries), np.float32)
        if values.shape != (len(addresses),):
            raise ValueError(
                f"values must be of shape [{len(addresses)}], got {list(values.shape)}\nhint: send one value a query"
            )
        finite = np.isfinite(values)
        if not finite.all():
            x, y, z = queries[np.argmin(finite)].tolist()
            raise NotFinite(int((~finite).sum()), (x, y, z))
        inside = bricks.store(addresses, values)
        self._inside, self._outside = self._inside + inside, self._outside + len(values) - inside

    def check_sides(self, level: float, *, unless: bool = False) -> None:
        """Raises EmptyField or FullField when all values lie on one side, `unless` finer levels may still find the other."""
        if not self._inside and not unless:
            raise EmptyField(sum(self.by_level), level)
        if not self._outside and not unless:
            raise FullField(sum(self.by_level), level)


def _check(resolution: int, bounds: float, level: float, method: str, coarse: int | None, max_evaluations: int | None) -> None:
    if not LEAST_RESOLUTION <= resolution <= MOST_RESOLUTION:
        raise _wrong("resolution", f"in {LEAST_RESOLUTION}..{MOST_RESOLUTION}", resolution, "256 and 384 are usual")
    if not (np.isfinite(bounds) and bounds > 0):
        raise _wrong("bounds", "finite and above 0", bounds, "1.01 fits Hunyuan3D's shapes")
    if not np.isfinite(level):
        raise _wrong("level", "finite", level, "0 is the surface of Hunyuan3D's fields")
    if method not in METHODS:
        raise _wrong(
            "method", f"one of {', '.join(METHODS)}", repr(method), "follow is exact for all parts that coarse points see"
        )
    if coarse is not None and not 4 <= coarse <= resolution:
        raise _wrong("coarse", f"in 4..{resolution}, which is resolution", coarse, "leave it out for the default")
    if max_evaluations is not None and max_evaluations < 1:
        raise _wrong("max_evaluations", "at least 1", max_evaluations, "leave it out for no limit")


def _wrong(what: str, expected: str, found: object, hint: str) -> ValueError:
    return ValueError(f"{what} must be {expected}, got {found}\nhint: {hint}")
