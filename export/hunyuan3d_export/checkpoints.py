"""Reads checkpoint files of any network: a .safetensors file, or a pickled dict of tensors or of dicts of tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_CHECKED_AT_ONCE = 2**18  # elements
NAMED_KEYS = 10  # an error lists at most this many keys
# Floating-point type -> the integers of its size, and the bits of its exponent, which are all set in a NaN or an infinity.
_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}

# select(keys, get, path) returns the tensors of one network. It reads them with get(key), so that all others stay on disk.
Select = Callable[[list[str], Callable[[str], Tensor], Path], dict[str, Tensor]]


class CheckpointError(ValueError):
    """The file is not a readable checkpoint of the network that was asked for."""


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, network: str) -> None:
    """Raises CheckpointError, which lists the wrong keys, when the keys and shapes of `state` differ from the expected ones."""
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
    if len(found) > 1 or not found <= _EXPONENTS.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise CheckpointError(
            f"{path} must hold weights of one floating-point type, got {names}\nhint: pass dtype=torch.float32 to convert them"
        )


def _is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    NumPy computes it in one thread: a server's models load at once, and torch's threads would hold each other up for minutes. It is
    done in parts, because the weights should stay the file's mapped pages.
    """
    integers, exponent = _EXPONENTS[value.dtype]
    bits = value.detach().reshape(-1).view(integers).numpy()
    parts = (bits[start : start + _CHECKED_AT_ONCE] for start in range(0, len(bits), _CHECKED_AT_ONCE))
    return not any(bool(((part & exponent) == exponent).any()) for part in parts)


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError, which names the tensors, when weights are NaN or infinite. It reads all of their bytes.

    The tensors lie on the CPU; those of a floating-point type have one that check_dtypes allows.
    """
    wrong = [key for key, value in state.items() if value.is_floating_point() and not _is_finite(value)]
    if not wrong:
        return
    more = f" and {len(wrong) - NAMED_KEYS} more" if len(wrong) > NAMED_KEYS else ""
    narrow = next(iter(state.values())).dtype == torch.float16
    raise CheckpointError(
        f"{path} must hold finite weights, got NaN or Inf in {', '.join(wrong[:NAMED_KEYS])}{more}\n"
        f"hint: get the file again{', or, where its weights exceed the range of fp16, --precision fp32 or bf16' if narrow else ''}"
    )


def read_state(path: Path, select: Select) -> dict[str, Tensor]:
    """The tensors that `select` picks from a .safetensors or pickled file. Raises CheckpointError for a damaged file."""
    # The content decides, because files are often named wrongly. torch writes a zip archive or, in old versions, a bare pickle.
    # A safetensors file starts with 8 bytes for the length of its JSON header, and these may look like the start of a pickle;
    # therefore the ninth byte, the header's brace, is checked first.
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


def _unsafe_objects(path: Path) -> str:
    """The names of what a pickle would call, as far as torch finds them in a file that is a zip archive."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError, OSError):
        names = []
    return f"objects of {', '.join(sorted(names)[:NAMED_KEYS])}" if names else "a damaged file or other objects"


def _read_pickle(path: Path, select: Select) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            # torch.load maps a file into memory only by its path, and it gives paths that end in .safetensors to safetensors.
            mapped = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
            loaded = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text advises to allow unsafe loading, which would let the file run any code.
        raise CheckpointError(
            f"{path} must be a checkpoint of plain tensors, got {_unsafe_objects(path)}; loading could run code from the file\n"
            "hint: use the .safetensors file, or a .ckpt from a source you trust that holds tensors alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
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
