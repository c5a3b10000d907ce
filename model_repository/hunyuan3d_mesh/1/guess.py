"""Which points small waves will need next: a thin part is followed cell by cell, and each wave costs the caller a round trip."""

from __future__ import annotations

import numpy as np
from bricks import AROUND, Bricks

_SMALL = 2048  # points of a wave that is worth enlarging
_FARTHEST = 16  # layers
_SHARE = 0.03  # of all evaluations may be guesses that were wrong
_KEY = np.array([2**24, 2**12, 1])
_DIRECTIONS = AROUND[AROUND.any(axis=1)]


class Guess:
    """Compares each wave with the one before: where it is the same pattern, moved by a step, the next steps are added."""

    def __init__(self, bricks: Bricks) -> None:
        self._bricks = bricks
        self._before = np.zeros(0, np.int64)
        self._layers = 1
        self._wasted = self._pending = 0

    def with_points_ahead(self, needed: np.ndarray, evaluations: int) -> np.ndarray:
        """The addresses `needed` [P] of unknown points, and further unknown ones if the wave is small."""
        if not 0 < len(needed) <= _SMALL:
            self._wasted, self._pending = self._wasted + self._pending, 0
            self._before = self._before[:0]
            return needed
        grid = self._bricks.grid(needed)
        moved = self._moved(grid, needed >> 9)
        self._before = np.sort(self._keys(grid))
        known_direction = moved.any(axis=1)
        if not known_direction.any():
            self._wasted, self._pending, self._layers = self._wasted + self._pending, 0, 1
            return needed
        self._pending = 0  # the wave goes on from the points guessed last, so they were right
        affordable = int(_SHARE * evaluations - self._wasted) // int(known_direction.sum())
        layers = min(self._layers, affordable)
        if layers < 1:
            return needed
        last = grid[known_direction] + layers * moved[known_direction]
        steps = np.arange(1, layers + 1)[:, None, None]
        ahead = (grid[known_direction] + steps * moved[known_direction]).reshape(-1, 3)
        # The last layers may lie far outside of the grid, where there are no bricks.
        ahead = ahead[((ahead >= 0) & (ahead < 8 * self._bricks.across)).all(axis=1)]
        addresses = self._bricks.unknown(ahead)
        self._before = np.union1d(self._before, self._keys(last))  # the next wave is one step after the last layer
        self._layers = min(2 * layers, _FARTHEST)
        self._pending = len(addresses)
        return np.union1d(needed, addresses)

    def _moved(self, grid: np.ndarray, bricks: np.ndarray) -> np.ndarray:
        """The step [P, 3] by which each point's brick of points follows from the wave before; 0 where there is none."""
        _, groups = np.unique(bricks, return_inverse=True)
        sizes = np.bincount(groups)
        hits = np.zeros((len(_DIRECTIONS), len(grid)), bool)
        if len(self._before):
            sought = self._keys(grid) - (_DIRECTIONS @ _KEY)[:, None]
            hits = self._before[np.minimum(np.searchsorted(self._before, sought), len(self._before) - 1)] == sought
        votes = np.stack([np.bincount(groups, hit, len(sizes)) for hit in hits])
        clear = 2 * votes.max(axis=0) > sizes
        return (_DIRECTIONS[votes.argmax(axis=0)] * clear[:, None])[groups]

    @staticmethod
    def _keys(grid: np.ndarray) -> np.ndarray:
        return grid @ _KEY
