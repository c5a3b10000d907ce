"""The inputs of a batch: pictures of a folder, a glob, a JSONL file or a list, each with a name; and the shards of a batch."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from . import requests
from .errors import InvalidInput, invalid
from .options import MESHING, SAMPLING

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Item:
    """One input: a picture or its views, the name of its output without an ending, and options in place of the batch's."""

    name: str
    image: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`. The name of an input decides its part, so that parts stay the same when inputs are added."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""

    def holds(self, name: str) -> bool:
        return zlib.crc32(name.encode()) % self.count == self.index

    @classmethod
    def of(cls, text: str | None, environ: Mapping[str, str] = os.environ) -> Shard:
        """A shard from "i/n", or from "n" with the index that Kubernetes gives the pods of an Indexed Job. Raises InvalidInput."""
        index = environ.get("JOB_COMPLETION_INDEX")
        if text is None:
            if index is not None:
                raise invalid(
                    "shard",
                    "given in an Indexed Job",
                    "none",
                    "shard=N (in the shell --shard N), the number of completions of the job",
                )
            return cls()
        found = re.fullmatch(r"(?:(\d+)/)?(\d+)", text)
        part = found and (found[1] or index)
        if not (found and part and 0 <= int(part) < int(found[2])):
            raise invalid(
                "shard",
                "I/N with I from 0 to N - 1, or N beside JOB_COMPLETION_INDEX",
                repr(text),
                "shard='0/4', in the shell --shard 0/4",
            )
        return cls(int(part), int(found[2]))


def items_of(pictures: Any, options: Mapping[str, Any]) -> list[Item]:
    """The inputs in the order of their names, whose names and options are checked. Raises InvalidInput, OSError."""
    if isinstance(pictures, str | Path):
        found = list(_of_path(pictures))
    elif isinstance(pictures, Iterable):
        found = [_of_value(index, each) for index, each in enumerate(pictures)]
    else:
        raise invalid("pictures", "a folder, a glob, a JSONL file or a list", type(pictures).__name__, "pass a list of paths")
    if not found:
        raise invalid("pictures", f"at least one of {', '.join(SUFFIXES)}", f"none in {pictures!r}", "check the folder")
    seen: dict[str, Item] = {}
    for item in found:
        path = PurePosixPath(item.name)
        if not item.name or path.is_absolute() or ".." in path.parts or path.name.startswith("."):
            raise invalid("name", "a path inside the output folder", repr(item.name), "leave `name` out for the picture's own")
        if item.name in seen:
            both = f"{seen[item.name].image} and {item.image}"
            raise invalid("names", "different for each picture", f"{item.name!r} of {both}", "rename one, or name it in JSONL")
        seen[item.name] = item
        requests.checked_options({**options, **item.options})
    return sorted(found, key=lambda item: item.name)


def _of_path(pictures: str | Path) -> Iterator[Item]:
    path = Path(pictures)
    if path.is_dir():
        files, base = [each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES], path
        files = [each for each in files if not any(part.startswith(".") for part in each.relative_to(base).parts)]
    elif path.suffix == ".jsonl":
        yield from _of_lines(path)
        return
    elif path.is_file():
        files, base = [path], path.parent
    else:
        first = next((index for index, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
        base, pattern = Path(*path.parts[:first]), "/".join(path.parts[first:])
        files = [each for each in base.glob(pattern) if each.is_file()] if pattern else []
    for file in files:
        yield Item(file.relative_to(base).with_suffix("").as_posix(), file)


def _of_lines(path: Path) -> Iterator[Item]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        hint = '{"image": "a.png", "seed": 7}'
        try:
            fields = json.loads(line)
            image = fields.pop("image")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise invalid(f"line {number} of {path}", "an object with `image`", line[:80], hint) from error
        views = [path.parent / view for view in (image if isinstance(image, list) else [image])]
        first = Path(str(image[0] if isinstance(image, list) else image)).with_suffix("")
        elsewhere = first.is_absolute() or ".." in first.parts
        name = fields.pop("name", first.name if elsewhere else first.as_posix())
        known = (*SAMPLING, *MESHING)
        if unknown := fields.keys() - set(known):
            raise invalid(f"line {number} of {path}", f"of the keys image, name, {', '.join(known)}", sorted(unknown), hint)
        try:
            requests.checked_options(fields)
            requests.check_meshing(fields)
        except InvalidInput as error:
            raise InvalidInput(f"line {number} of {path}: {error}") from error
        yield Item(str(name), views if isinstance(image, list) else views[0], fields)


def _of_value(index: int, value: Any) -> Item:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return Item(Path(first).stem if isinstance(first, str | Path) else f"{index:06d}", value)
