"""Arrays in files: read from .npy, .npz and .safetensors, written to .npy and .safetensors. Needs safetensors."""

from __future__ import annotations

import contextlib
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from .errors import invalid
from .files import atomic_path

_READ, WRITTEN = (".npy", ".npz", ".safetensors"), (".npy", ".safetensors")


def load(path: Path | None, name: str) -> npt.NDArray[Any] | None:
    """The array called `name` of a file, or its only array. None for no path. Raises InvalidInput, OSError."""
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
def writable(path: Path, suffixes: Sequence[str] = WRITTEN, *, option: str = "--out") -> Iterator[Path]:
    """A temporary path to write to in place of `path`, see files.atomic_path. option: what names the path on the command line.

    A path that cannot be written is refused before the body runs, because the body may be minutes of work.
    Raises InvalidInput, OSError.
    """
    if path.suffix not in suffixes:
        raise invalid(option, f"a {' or '.join(suffixes)} file", str(path), "name the kind by its ending")
    if not path.parent.is_dir():  # a folder that does not exist is probably misspelt, so it is not created
        raise invalid(option, "in a folder that exists", str(path), f"mkdir -p {shlex.quote(str(path.parent))}")
    with atomic_path(path) as temporary:
        temporary.touch()
        yield temporary


def save(path: Path, suffix: str, name: str, array: npt.NDArray[Any]) -> None:
    """Write `array` to `path` in the format of `suffix`; in .safetensors it is called `name`."""
    if suffix == ".safetensors":
        safetensors.numpy.save_file({name: np.ascontiguousarray(array)}, path)
    else:
        with path.open("wb") as file:
            np.save(file, array)
