"""The command's files: arrays in as .npy, .npz or .safetensors, out as .npy or .safetensors, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from .errors import invalid

_READ, _WRITTEN = (".npy", ".npz", ".safetensors"), (".npy", ".safetensors")


def load(path: Path | None, name: str) -> npt.NDArray[Any] | None:
    """The only array of a file, or the one called `name`."""
    if path is None:
        return None
    try:
        arrays = _arrays(path)
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        hint = "write it with numpy.save, or as float16 or float32 with safetensors"
        raise invalid(str(path), f"a {', '.join(_READ)} file of numbers", str(error), hint) from error
    if name in arrays or len(arrays) == 1:
        return arrays[name if name in arrays else next(iter(arrays))]
    raise invalid(str(path), f"a file with {name}", list(arrays), f"numpy.savez(path, {name}=array)")


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    if path.suffix == ".safetensors":
        return dict(safetensors.numpy.load_file(path))
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, made now so that a bad path fails before the work; it takes `path`'s place at the end."""
    if path.suffix not in _WRITTEN:
        raise invalid("--out", f"a {' or '.join(_WRITTEN)} file", str(path), "name the kind by its ending")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.touch()
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save(path: Path, suffix: str, name: str, array: npt.NDArray[Any]) -> None:
    if suffix == ".safetensors":
        safetensors.numpy.save_file({name: np.ascontiguousarray(array)}, path)
    else:
        with path.open("wb") as file:
            np.save(file, array)
