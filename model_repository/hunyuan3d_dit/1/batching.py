"""What every Python runtime does with requests: refuse bad ones, join those of equal shape, split the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Tensors = Mapping[str, Any]


class InvalidInput(ValueError):
    """A request the network cannot take; its own fault, not the server's."""


def velocities(
    requests: Sequence[Tensors], evaluate: Callable[[dict[str, Any]], Any], library: ModuleType
) -> list[Any | InvalidInput]:
    """For each request, latents [B, L, 64], t [B, 1] or [B], ... -> velocity [B, L, 64], or the reason there is none.

    library is the arrays' own module, numpy or torch; evaluate takes them stacked, with t and the scales as [B].
    """
    return in_groups(requests, evaluate, lambda tensors: _problem(tensors, library), library)


def in_groups(
    requests: Sequence[Tensors],
    evaluate: Callable[[dict[str, Any]], Any],
    problem: Callable[[Tensors], InvalidInput | None],
    library: ModuleType,
) -> list[Any | InvalidInput]:
    """For each request its rows of `evaluate` over all requests of its shapes, or its `problem`."""
    results: list[Any | InvalidInput] = [problem(tensors) for tensors in requests]
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, tensors in enumerate(requests):
        if results[index] is None:
            shapes = tuple(tuple(tensors[name].shape[1:]) for name in sorted(tensors))
            groups.setdefault(shapes, []).append(index)
    for members in groups.values():
        together = evaluate(_stack([requests[index] for index in members], library))
        start = 0
        for index in members:
            rows = len(next(iter(requests[index].values())))
            results[index] = together[start : start + rows]
            start += rows
    return results


def _stack(batch: Sequence[Tensors], library: ModuleType) -> dict[str, Any]:
    stacked = {name: library.concatenate([tensors[name] for tensors in batch]) for name in batch[0]}
    return {name: value if value.ndim > 2 else value.reshape(-1) for name, value in stacked.items()}


def _problem(tensors: Tensors, library: ModuleType) -> InvalidInput | None:
    for name, value in tensors.items():
        if 0 in value.shape:
            return InvalidInput(f"{name} must not be empty, got shape {list(value.shape)}")
        if not library.isfinite(value).all():
            return InvalidInput(f"{name} must be finite, got NaN or Inf")
    first, last = float(tensors["t"].min()), float(tensors["t"].max())
    if first < 0 or last > 1:
        return InvalidInput(f"t must be in [0, 1], got {first:g} to {last:g}")
    return None
