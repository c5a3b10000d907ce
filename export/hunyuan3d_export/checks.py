"""The comparison of two results: how far apart they are, and how far apart they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

# Axis -> its sizes (min, ..., max), as they stand in a plan's manifest.
Profile = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison. sizes: the sizes of `axes` that it ran at, 0 for an axis that the model lacks. relative_l2 and max_abs:
    the errors that it found. tolerance: the largest relative_l2 that passes."""

    name: str
    sizes: tuple[int, ...]
    relative_l2: float
    max_abs: float
    tolerance: float
    axes: str = "BLT"

    @property
    def passed(self) -> bool:
        return self.relative_l2 <= self.tolerance

    @property
    def shown_sizes(self) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.sizes, strict=True) if size)

    def __str__(self) -> str:
        return f"{self.name}, {self.shown_sizes}: {self.relative_l2:.1e} {'ok' if self.passed else 'FAILED'}"


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compare(
    name: str, sizes: tuple[int, ...], found: Tensor, expected: Tensor, *, tolerance: float, axes: str = "BLT"
) -> Check:
    """The Check of `found` against `expected`, two tensors of one shape."""
    worst = float((found.double() - expected.double()).abs().max())
    return Check(name, sizes, relative_l2(found, expected), worst, tolerance, axes)


def within(profile: Profile | None, sizes: tuple[int, ...], axes: str = "BLT") -> tuple[int, ...]:
    """The sizes of `axes`, each moved into the range that `profile` gives; the size of an axis without a range stays."""
    profile = profile or {}
    return tuple(
        min(max(size, profile[axis][0]), profile[axis][-1]) if axis in profile else size
        for axis, size in zip(axes, sizes, strict=True)
    )
