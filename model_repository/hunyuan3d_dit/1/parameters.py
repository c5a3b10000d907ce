"""The one parser of parameters in config.pbtxt: a dataclass declares their names and types, and every parameter is read.

The Python models that need this file but live in another folder have a symbolic link to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Triton's Python backend reads the first, the server's launcher the second. No model's code reads either of them.
READ_BY_OTHERS = frozenset({"FORCE_CPU_ONLY_INPUT_TENSORS", "needs"})


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """For a model that takes no parameters of its own."""


def of_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of a model's config, as Triton hands it to the Python backend: name -> text."""
    return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}


def parse(options: type[T], texts: Mapping[str, str]) -> T:
    """The dataclass `options`, whose fields are int, float, bool or str, from the texts of its parameters.

    Raises ValueError for a missing or unknown parameter and for a value that is not of its type.
    """
    parsed, others = split(options, texts)
    if others:
        raise _wrong_names(options, texts)
    return parsed


def split(options: type[T], texts: Mapping[str, str]) -> tuple[T, dict[str, str]]:
    """As `parse`, but parameters that `options` does not declare are returned instead of refused."""
    given = {name: text for name, text in texts.items() if name not in READ_BY_OTHERS}
    kinds = {field.name: str(field.type) for field in dataclasses.fields(options)}
    if not kinds.keys() <= given.keys():
        raise _wrong_names(options, texts)
    parsed = options(**{name: _PARSERS[kind](name, given.pop(name)) for name, kind in kinds.items()})
    return parsed, given


def _wrong_names(options: type, texts: Mapping[str, str]) -> ValueError:
    declared = ", ".join(field.name for field in dataclasses.fields(options)) or "none"
    return ValueError(f"parameters must be {declared}, got {', '.join(sorted(set(texts) - READ_BY_OTHERS)) or 'none'}")


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{name} must be an integer, got {text!r}") from error


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {text!r}")
    return text == "true"


def _text(_name: str, text: str) -> str:
    return text


_PARSERS = {"int": _integer, "float": _number, "bool": _boolean, "str": _text}
