"""The values of one level's grid, in bricks of 8 x 8 x 8 points that exist only where the surface passes.

A point has a flag beside its value: 0 unknown, INSIDE or OUTSIDE. The eight flags of a row of points are the bytes of one 64-bit
word, so that one operation handles eight points. Brick 0 stands for all bricks that do not exist: its points stay unknown.

Grid indices: on a level of stride s, index g is the point g * s - 1 of the fine grid 0..R. Points beyond 0..R are virtual: they
are outside and never evaluated, which closes the surface at the box.
"""

from __future__ import annotations

import numpy as np
import words
from words import CORNERS

EDGE = 8
SIZE = EDGE**3
INSIDE, OUTSIDE = 1, 2
_BIT = np.uint64(1)
AROUND = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], [-1, 0, 1], indexing="ij"), axis=-1).reshape(27, 3)
_PLACES = np.array([EDGE * EDGE, EDGE, 1])
_PACKING, _COORDINATE = np.array([2**42, 2**21, 1]), 2**21 - 1
LOCAL = np.stack(np.unravel_index(np.arange(SIZE), (EDGE,) * 3), axis=-1).astype(np.int32)
_PACKED_LOCAL = LOCAL @ _PACKING


class Bricks:
    """One level. `parent` is the level of twice the stride, whose values are taken over when a brick is made."""

    def __init__(self, resolution: int, *, stride: int, points: int, level: float, parent: Bricks | None = None) -> None:
        self.resolution, self.stride, self.level, self.parent = resolution, stride, level, parent
        self.across = -(-points // EDGE)  # bricks along an axis
        self.directory = np.zeros((self.across + 2,) * 3, np.int32)  # with a border, so that neighbours need no test
        self._steps = np.array([(self.across + 2) ** 2, self.across + 2, 1])
        self.count = 1
        self.origins = np.zeros((1, 3), np.int32)  # in bricks
        self._packed = np.zeros(1, np.int64)  # the grid indices of a brick's first point, 21 bits each
        self.values = np.zeros((1, SIZE), np.float32)
        self.flags = np.zeros((1, EDGE, EDGE), np.uint64)
        self.mixed = np.zeros((1, EDGE, EDGE), np.uint64)  # cells with corners on both sides, by their lowest corner

    def ensure(self, origins: np.ndarray) -> None:
        """Makes those of the bricks at `origins` [N, 3] that do not exist yet; none is made more than one brick outside the grid."""
        keys = (origins + 1) @ self._steps
        keys = np.unique(keys[self.directory.reshape(-1)[keys] == 0])
        new = np.stack(np.unravel_index(keys, self.directory.shape), axis=-1).astype(np.int32) - 1
        inner = ((new >= 0) & (new < self.across)).all(axis=1)
        keys, new = keys[inner], new[inner]
        if not len(keys):
            return
        first, self.count = self.count, self.count + len(new)
        self._grow()
        self.directory.reshape(-1)[keys] = np.arange(first, self.count)
        self.origins[first : self.count] = new
        self._packed[first : self.count] = (new.astype(np.int64) * EDGE) @ _PACKING
        if self.parent is not None:
            self._inherit(first, new)
        self._mark_virtual(first, new)

    def _grow(self) -> None:
        if self.count > len(self.values):
            capacity = max(self.count, len(self.values) * 5 // 4)
            for name in ("origins", "_packed", "values", "flags", "mixed"):
                old = getattr(self, name)
                grown = np.zeros((capacity, *old.shape[1:]), old.dtype)
                grown[: len(old)] = old
                setattr(self, name, grown)

    def _inherit(self, first: int, new: np.ndarray) -> None:
        parent = self.parent
        assert parent is not None
        parent.ensure(new >> 1)
        rows = parent.rows(new >> 1)
        flags, values = self.bytes().reshape(-1, EDGE, EDGE, EDGE), self.values.reshape(-1, EDGE, EDGE, EDGE)
        parent_flags, parent_values = parent.bytes().reshape(-1, 8, 8, 8), parent.values.reshape(-1, 8, 8, 8)
        octants = (new & 1) @ np.array([4, 2, 1])
        for octant, (x, y, z) in enumerate(CORNERS * (EDGE // 2)):
            here = np.flatnonzero(octants == octant)
            if not len(here):
                continue
            part = (rows[here], slice(x, x + 4), slice(y, y + 4), slice(z, z + 4))
            flags[first + here, ::2, ::2, ::2] = parent_flags[part]
            values[first + here, ::2, ::2, ::2] = parent_values[part]

    def _mark_virtual(self, first: int, new: np.ndarray) -> None:
        last = (self.resolution + 1) // self.stride  # the last grid index of a point in the box; the first one is 1
        border = np.flatnonzero(((new == 0) | (new * EDGE + EDGE > last)).any(axis=1))
        grid = new[border, None] * EDGE + LOCAL
        brick, point = np.nonzero(((grid == 0) | (grid > last)).any(axis=2))
        rows = first + border[brick]
        self.bytes()[rows, point] = OUTSIDE
        self.values[rows, point] = np.float32(self.level - 1)

    def bytes(self) -> np.ndarray:
        """The flags as [bricks, 512] uint8."""
        return self.flags.view(np.uint8).reshape(-1, SIZE)

    def rows(self, origins: np.ndarray) -> np.ndarray:
        """The bricks at `origins` [..., 3], at most one brick outside the grid; 0 where there is none."""
        return self.directory.reshape(-1)[(origins + 1) @ self._steps]

    def grid(self, addresses: np.ndarray) -> np.ndarray:
        """The grid indices [P, 3] int32 of points that are given as brick * 512 + place."""
        packed = self._packed[addresses >> 9] + _PACKED_LOCAL[addresses & (SIZE - 1)]  # faster than to pick rows of three
        return np.stack([packed >> 42, (packed >> 21) & _COORDINATE, packed & _COORDINATE], axis=-1).astype(np.int32)

    def further(self, addresses: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The addresses of the points that lie `step` [3] (0 or 1 along each axis) after others, in bricks that exist."""
        result = addresses + step @ _PLACES
        last = np.zeros(len(addresses), bool)
        for along, place in zip(step, _PLACES, strict=True):
            if along:
                last |= (addresses // place & (EDGE - 1)) == EDGE - 1
        crossing = np.flatnonzero(last)
        local = LOCAL[addresses[crossing] & (SIZE - 1)] + step
        rows = self.rows(self.origins[addresses[crossing] >> 9] + local // EDGE)
        result[crossing] = rows.astype(np.int64) * SIZE + (local % EDGE) @ _PLACES
        return result

    def addresses(self, grid: np.ndarray) -> np.ndarray:
        """The addresses of the points `grid` [..., 3]."""
        return self.rows(grid >> 3).astype(np.int64) * SIZE + (grid & (EDGE - 1)) @ _PLACES

    def unknown(self, grid: np.ndarray) -> np.ndarray:
        """The addresses of those of the points `grid` [P, 3] that are unknown, in rising order, each once."""
        self.ensure(grid >> 3)
        addresses = np.unique(self.addresses(grid))
        return addresses[self.bytes().reshape(-1)[addresses] == 0]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> int:
        """Keeps the values [P] of unknown points; returns how many of them are inside."""
        inside = values > np.float32(self.level)
        self.values.reshape(-1)[addresses] = values
        self.bytes().reshape(-1)[addresses] = np.where(inside, np.uint8(INSIDE), np.uint8(OUTSIDE))
        return int(inside.sum())

    def neighbours(self, rows: np.ndarray, direction: int = 1) -> np.ndarray:
        """[N, 8]: the bricks `rows` [N] and those after them (direction 1) or before them (-1), in the order of CORNERS."""
        return self.rows(self.origins[rows][:, None] + direction * CORNERS)

    def around(self, rows: np.ndarray) -> np.ndarray:
        """The bricks `rows` [N] and all their neighbours, each once, without brick 0."""
        near = np.zeros(self.count, bool)
        near[self.rows(self.origins[rows][:, None] + AROUND)] = True
        near[0] = False
        return np.flatnonzero(near)

    def missing(self, changed: np.ndarray) -> np.ndarray:
        """The addresses of unknown points that mixed cells need, after points in the bricks `changed` [N] became known."""
        near = self.around(changed)
        after, before = self.neighbours(near), self.neighbours(near, -1)
        self.mixed[near] = words.both(words.any_corner(self.flags, after))
        count = self.count
        self._spread(near, after, before)
        if self.count > count:
            near = self.around(changed)
            before = self.neighbours(near, -1)
        needed = words.any_cell(self.mixed, before)
        flags = self.flags[near]
        return words.addresses(needed & ~(flags | (flags >> _BIT)), near)

    def _spread(self, rows: np.ndarray, after: np.ndarray, before: np.ndarray) -> None:
        """Makes the bricks that mixed cells at the borders of the bricks `rows` reach into, or have mixed neighbours in.

        after, before: the neighbours [N, 8] of `rows` in both directions.
        """
        mixed = self.mixed[rows]
        whole_z = np.bitwise_or.reduce(mixed, axis=(1, 2))
        wanted = []
        for last, last_z, direction, there in ((7, words.LAST_BYTE, 1, after), (0, np.uint64(0), -1, before)):
            x = np.bitwise_or.reduce(mixed[:, last], axis=1) > 0
            y = np.bitwise_or.reduce(mixed[:, :, last], axis=1) > 0
            z = (whole_z >> last_z & np.uint64(1)) > 0
            reach = np.stack([x, y, z], axis=1)
            brick, corner = np.nonzero((there == 0) & (reach[:, None] >= CORNERS).all(axis=2))
            wanted.append(self.origins[rows[brick]] + direction * CORNERS[corner])
        self.ensure(np.concatenate(wanted))
