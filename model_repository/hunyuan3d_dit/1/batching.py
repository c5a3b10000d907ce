"""What happens to requests before and after a network: bad ones are refused, those of equal shapes are evaluated together.

Knows nothing of Triton, of a runtime or of a network: names come from the model's config, fixed sizes from its graph.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from finite import all_finite

Tensors = Mapping[str, Any]
Shapes = tuple[tuple[int, ...], ...]

# The sampler sets this request parameter, because it has checked the values already, and repeating that at every step costs
# time. A client may set it too: rows of a batch do not influence each other, so it can only spoil its own result.
CHECKED = "checked"

_NUMBER = r"-?\d+(?:\.\d+)?"
_LIMIT = re.compile(rf"(\w+)(?:\[(\d+)\])? in ({_NUMBER})\.\.({_NUMBER})(?: (\w+))?")


class InvalidInput(ValueError):
    """The network cannot take this request, which is the caller's fault and not the server's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The parameters that every served network has. runtime: onnxruntime, torch or tensorrt_rtx. model_file: the network, in
    the version folder. limits: what a request's tensors must be, as `parse_limits` reads it.
    """

    runtime: str
    model_file: str
    limits: str


@dataclasses.dataclass(frozen=True)
class Limit:
    """A range, ends included: of a tensor's values, or with `axis` of its size there. counted: a word for what the axis counts."""

    name: str
    axis: int | None
    low: float
    high: float
    counted: str = ""

    def check_size(self, shape: Sequence[int]) -> None:
        """Raises InvalidInput. A limit that says what it counts refuses every empty tensor too: it holds none of that."""
        assert self.axis is not None
        if len(shape) > self.axis and self.low <= shape[self.axis] <= self.high and not (self.counted and 0 in shape):
            return
        sizes = f"{self.low:g} to {self.high:g}"
        if self.counted:
            wanted = f"be of {sizes} {self.counted}"
        else:
            wanted = f"have size {sizes if self.low < self.high else f'{self.low:g}'} on axis {self.axis}"
        raise InvalidInput(f"{self.name} must {wanted}, got shape {list(shape)}")

    def check_values(self, array: Any) -> None:
        """Raises InvalidInput."""
        first, last = float(array.min()), float(array.max())
        if first < self.low or last > self.high:
            raise InvalidInput(f"{self.name} must be in [{self.low:g}, {self.high:g}], got {first:g} to {last:g}")


def parse_limits(text: str, names: Iterable[str]) -> list[Limit]:
    """Limits from a text like `t in 0..1; pixels[1] in 1..4 views`: entries with semicolons between them, none in an empty text.

    An entry is `NAME in LOW..HIGH` for the values of a tensor, or `NAME[AXIS] in LOW..HIGH COUNTED` for its size on an axis.
    Axis 0 is the batch. COUNTED is a word for error messages and may be left out.

    Raises ValueError for another form, an unknown name or an empty range.
    """
    limits = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        found = _LIMIT.fullmatch(entry)
        if found is None:
            raise ValueError(f"limits must be entries like 't in 0..1' or 'pixels[1] in 1..4 views', got {entry!r}")
        name, axis, low, high, counted = found.groups()
        if name not in (known := list(names)):
            raise ValueError(f"limits must be of the inputs {', '.join(known)}, got {name!r}")
        if float(low) > float(high):
            raise ValueError(f"limits must be LOW..HIGH, got {entry!r}")
        limits.append(Limit(name, None if axis is None else int(axis), float(low), float(high), counted or ""))
    return limits


class Inputs:
    """The inputs of one network: their names, and what a request's tensors must be.

    config: the inputs of the model's config, as Triton hands it to the Python backend. fixed_sizes: name -> axis -> the only size
    that the graph takes there. library: the arrays' own module, numpy or torch.

    Raises ValueError for `limits` that `parse_limits` refuses.
    """

    def __init__(
        self,
        config: Sequence[Mapping[str, Any]],
        limits: str,
        fixed_sizes: Mapping[str, Mapping[int, int]],
        library: ModuleType,
    ) -> None:
        self.names = [tensor["name"] for tensor in config]
        # Triton has no inputs of shape [B]: the config makes them [B, 1] and asks for the 1 to be reshaped away.
        self._per_sample = {tensor["name"] for tensor in config if "reshape" in tensor and not tensor["reshape"].get("shape")}
        found = parse_limits(limits, self.names)
        self._values = [limit for limit in found if limit.axis is None]
        sizes = {(limit.name, limit.axis): limit for limit in found if limit.axis is not None}
        for name in self.names:
            for axis, size in fixed_sizes.get(name, {}).items():
                limit = sizes.get((name, axis), Limit(name, axis, size, size))
                sizes[name, axis] = dataclasses.replace(limit, low=size, high=size)
        self._sizes = list(sizes.values())
        self._library = library

    def prepare(self, tensors: Tensors, *, check_values: bool = True) -> dict[str, Any]:
        """A request's tensors as the network takes them: what the config calls [B, 1] and reshapes becomes [B].

        Raises InvalidInput; values are looked at only with check_values, sizes always.
        """
        shaped = {name: value.reshape(-1) if name in self._per_sample else value for name, value in tensors.items()}
        for limit in self._sizes:
            limit.check_size(shaped[limit.name].shape)
        for name, value in shaped.items():
            if 0 in value.shape:
                raise InvalidInput(f"{name} must not be empty, got shape {list(value.shape)}")
        if check_values:
            for name, value in shaped.items():
                if not all_finite(value, self._library):
                    raise InvalidInput(f"{name} must be finite, got NaN or Inf")
            for limit in self._values:
                limit.check_values(shaped[limit.name])
        return shaped


def evaluate(
    requests: Sequence[Tensors | Exception], run: Callable[[dict[str, Any]], Tensors], library: ModuleType
) -> list[Tensors | Exception]:
    """For each request its rows of the outputs of `run`, or the reason why there are none.

    Requests of equal shapes are evaluated together. A request that is an error already keeps that error. When an evaluation fails,
    its error goes to the requests that shared it and to no others. `library` is the arrays' own module, numpy or torch.
    """
    results = list(requests)
    for members in _groups(requests):
        batch = [requests[index] for index in members]
        try:
            parts = _split(run(_stack(batch, library)), [_rows(tensors) for tensors in batch])
        except Exception as error:
            parts = [error] * len(members)
        for index, part in zip(members, parts, strict=True):
            results[index] = part
    return results


def _groups(requests: Sequence[Tensors | Exception]) -> Iterable[list[int]]:
    """The indexes of the requests that can be evaluated together."""
    groups: dict[Shapes, list[int]] = {}
    for index, tensors in enumerate(requests):
        if not isinstance(tensors, Exception):
            shapes = tuple(tuple(tensors[name].shape[1:]) for name in sorted(tensors))
            groups.setdefault(shapes, []).append(index)
    return groups.values()


def _rows(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def _stack(batch: Sequence[Tensors], library: ModuleType) -> dict[str, Any]:
    if len(batch) == 1:  # a context of v2-0 is 4 MB, and a lone request would be copied at every diffusion step
        return dict(batch[0])
    return {name: library.concatenate([tensors[name] for tensors in batch]) for name in batch[0]}


def _split(outputs: Tensors, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The outputs of a stacked batch for each of its requests, which have these numbers of rows.

    Raises ValueError for an output with another number of rows: its requests would get each other's.
    """
    for name, value in outputs.items():
        if len(value) != sum(rows):
            raise ValueError(f"{name} must have {sum(rows)} rows, got {len(value)}")
    ends = [sum(rows[: index + 1]) for index in range(len(rows))]
    return [{name: value[end - count : end] for name, value in outputs.items()} for end, count in zip(ends, rows, strict=True)]
