"""A model's parameters in config.pbtxt as a dataclass: every one read, every one known, every value parsed by its type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def parse(options: type[T], parameters: Mapping[str, str]) -> T:
    """The dataclass `options`, whose fields are int, bool or str, from texts.

    Raises ValueError for a missing or unknown parameter and for a value that is not of its type.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(options)}
    if set(parameters) != set(fields):
        raise ValueError(f"parameters must be {', '.join(fields)}, got {', '.join(sorted(parameters))}")
    return options(**{name: _value(name, kind, parameters[name]) for name, kind in fields.items()})


def _value(name: str, kind: str, text: str) -> Any:
    if kind == "bool":
        if text not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text == "true"
    if kind == "int":
        try:
            return int(text)
        except ValueError as error:
            raise ValueError(f"{name} must be an integer, got {text!r}") from error
    return text
