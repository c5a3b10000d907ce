"""Reading checkpoint files of any network: a .safetensors file, or a pickled dict of tensors or of parts."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMED_KEYS = 10  # an error names at most so many keys
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# select(keys, get, path) picks the tensors of one network: get(key) reads a tensor, so that the others stay on disk.
Select = Callable[[list[str], Callable[[str], Tensor], Path], dict[str, Tensor]]


class CheckpointError(ValueError):
    """The file is not a readable checkpoint of the network that was asked for."""


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, network: str) -> None:
    """Raises CheckpointError, naming what is wrong, when keys and shapes are not exactly the expected ones."""
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} must be {list(expected[key].shape)}, got {list(value.shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if problems:
        more = [f"... and {len(problems) - NAMED_KEYS} more"] if len(problems) > NAMED_KEYS else []
        raise CheckpointError(f"{path} must fit a {network} exactly:\n  " + "\n  ".join(problems[:NAMED_KEYS] + more))


def check_dtypes(state: Mapping[str, Tensor], path: Path) -> None:
    found = {value.dtype for value in state.values()}
    if len(found) > 1 or not found <= set(_DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise CheckpointError(
            f"{path} must hold weights of one floating-point type, got {names}\nhint: pass dtype=torch.float32 to convert them"
        )


def read_state(path: Path, select: Select) -> dict[str, Tensor]:
    """What `select(keys, get, path)` picks from a .safetensors or pickled file. Raises CheckpointError for a damaged one."""
    # The content decides, because files are often named wrongly. A safetensors file starts with the length of its JSON header,
    # whose low byte may look like a pickle's \x80; a torch file is a zip archive or, from old versions, a bare pickle.
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{" and start[:2] in (b"PK", b"\x80\x02"):
        return _read_pickle(path, select)
    return _read_safetensors(path, select)


def _read_safetensors(path: Path, select: Select) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return select(list(file.keys()), file.get_tensor, path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} must be a whole .safetensors or .ckpt file, got: {error}\nhint: compare its size with the source's; a download may have stopped early"
        ) from error


def _read_pickle(path: Path, select: Select) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            # torch.load maps only a path into memory, and it would hand a path of this suffix to safetensors.
            mapped = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
            loaded = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} must be a whole checkpoint of plain tensors, got: {first_line}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a dict, got {type(loaded).__name__}")
    flat: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": tensor for inner, tensor in value.items() if isinstance(tensor, Tensor)})
        elif isinstance(value, Tensor):
            flat[key] = value
    return select(list(flat), flat.__getitem__, path)
