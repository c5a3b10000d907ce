"""Bricks of 8 x 8 x 8 bytes as 8 x 8 words of 64 bits: one operation handles a row of eight points.

`words` [bricks, 8, 8] uint64 are all bricks; brick 0 is empty. `rows` [N, 8] names N bricks with their neighbours: first the
brick itself, last the one that is further along all three axes, in the order of CORNERS.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# The corners of a cell: (0, 0, 0), (0, 0, 1), (0, 1, 0), ... (1, 1, 1).
CORNERS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(8, 3)
ONES = np.uint64(0x0101010101010101)
BYTE, LAST_BYTE = np.uint64(8), np.uint64(56)


def corners(words: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Eight times [N, 8, 8]: at the place of each cell, the bytes of its corner (0, 0, 0), then of (0, 0, 1), and so on."""
    here, beyond = _upper_halo(words, rows[:, ::2]), _upper_halo(words, rows[:, 1::2])
    above = (here >> BYTE) | (beyond << LAST_BYTE)
    for x, y, z in CORNERS:
        yield (above if z else here)[:, x : x + 8, y : y + 8]


def any_corner(words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[N, 8, 8]: the bytes of a cell's eight corners, combined by or."""
    here, beyond = _upper_halo(words, rows[:, ::2]), _upper_halo(words, rows[:, 1::2])
    here |= (here >> BYTE) | (beyond << LAST_BYTE)
    return _both_axes(here)


def any_cell(words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[N, 8, 8]: the bytes of the eight cells around a point, combined by or; here the neighbours are those before a brick."""
    here, before = _lower_halo(words, rows[:, ::2]), _lower_halo(words, rows[:, 1::2])
    here |= (here << BYTE) | (before >> LAST_BYTE)
    return _both_axes(here)


def both(flags: np.ndarray) -> np.ndarray:
    """1 in each byte that has the bits of value 1 and 2."""
    return flags & (flags >> np.uint64(1)) & ONES


def addresses(marks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The points (brick * 512 + place) whose byte is 1 and not 0 in `marks` [N, 8, 8], the words of the bricks `rows` [N]."""
    found = np.flatnonzero(marks.view(bool))
    return (rows.astype(np.int64)[found >> 9] << 9) + (found & 511)


def _both_axes(halo: np.ndarray) -> np.ndarray:
    half = halo[:, :-1] | halo[:, 1:]
    return half[:, :, :-1] | half[:, :, 1:]


def _upper_halo(words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    halo = np.empty((len(rows), 9, 9), np.uint64)
    halo[:, :8, :8] = words[rows[:, 0]]
    halo[:, :8, 8] = words[rows[:, 1], :, 0]
    halo[:, 8, :8] = words[rows[:, 2], 0]
    halo[:, 8, 8] = words[rows[:, 3], 0, 0]
    return halo


def _lower_halo(words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    halo = np.empty((len(rows), 9, 9), np.uint64)
    halo[:, 1:, 1:] = words[rows[:, 0]]
    halo[:, 1:, 0] = words[rows[:, 1], :, 7]
    halo[:, 0, 1:] = words[rows[:, 2], 7]
    halo[:, 0, 0] = words[rows[:, 3], 7, 7]
    return halo
