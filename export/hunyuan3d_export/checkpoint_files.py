"""The files of a checkpoint that the user named: a file, a folder as the hub lays it out, or a repository on the hub."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from hunyuan3d_client.install import install_hint

CONFIG_FILE = "config.yaml"
# The order in which weights are looked for: half precision first, as upstream's own pipeline does.
WEIGHTS_FILES = ("model.fp16.safetensors", "model.safetensors", "model.fp16.ckpt", "model.ckpt")
_PATTERNS = (*WEIGHTS_FILES, "model*.safetensors", "model*.ckpt")
_SUFFIXES = (".safetensors", ".ckpt")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """name: of the checkpoint, for folders that are made from it. weights: the file. config: its config.yaml, where there is one."""

    name: str
    weights: Path
    config: Path | None = None


def find_files(checkpoint: Path, subfolder: str | None = None) -> CheckpointFiles:
    """The files of `checkpoint`: a path on this machine or, where no such path exists, an id on the hub, which is then downloaded.

    subfolder: the folder inside it that holds the weights.

    Raises FileNotFoundError when there are no weights, ValueError when the hub refuses or the package huggingface_hub is missing.
    """
    if is_hub_id(checkpoint):
        return _download(checkpoint.as_posix(), subfolder)
    path = checkpoint / subfolder if subfolder else checkpoint
    weights = path if path.is_file() else _weights_in(path)
    if weights is None:
        found = f"a folder at {path} without model*.safetensors and model*.ckpt" if path.is_dir() else f"nothing at {path}"
        raise FileNotFoundError(
            f"checkpoint must be a .safetensors or .ckpt file, a folder that holds one, or the id of a repository on the hub, found {found}"
        )
    config = weights.with_name(CONFIG_FILE)
    return CheckpointFiles(_name(path), weights, config if config.is_file() else None)


def _name(path: Path) -> str:
    """The name of a file or folder, for folders that are made from it. A .ckpt and a .safetensors of the same weights get different names.

    Official files all share a few names, such as model.fp16.safetensors, so a file's folder belongs into its name.
    """
    path = path.resolve()
    return f"{path.parent.name}-{path.name}".removesuffix(".safetensors") if path.is_file() else path.name


def is_hub_id(checkpoint: Path) -> bool:
    """Whether `checkpoint` is written like an id on the hub (owner/name) and is no path on this machine."""
    return checkpoint.suffix not in _SUFFIXES and bool(_HUB_ID.fullmatch(checkpoint.as_posix())) and not checkpoint.exists()


def _weights_in(folder: Path) -> Path | None:
    return next((path for pattern in _PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()), None)


def _download(repository: str, subfolder: str | None) -> CheckpointFiles:
    """The files in the hub's cache on this machine; those that are missing or have changed are downloaded, with a progress bar."""
    with _hub_errors(repository):
        config = _fetch(repository, CONFIG_FILE, subfolder)
        weights = next((path for name in WEIGHTS_FILES if (path := _fetch(repository, name, subfolder))), None)
    if weights is None:
        raise FileNotFoundError(
            f"{repository} must hold one of {', '.join(WEIGHTS_FILES)}, found none in {subfolder or 'its first folder'} on the hub or in the cache\n"
            "hint: --subfolder names the folder of the weights, such as hunyuan3d-dit-v2-0; without a connection only cached files are found"
        )
    return CheckpointFiles(Path(subfolder or repository).name, weights, config)


def _fetch(repository: str, name: str, subfolder: str | None) -> Path | None:
    """One file; None where neither the hub nor the cache has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder))
    except EntryNotFoundError:
        return None


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns the errors of the package huggingface_hub into one ValueError with a hint."""
    try:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise ValueError(
            f"checkpoint must be a path on this machine without the package huggingface_hub, got {repository}\nhint: {install_hint('export')}"
        ) from error
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"the hub must give {repository}, got: {reason}\nhint: `hf auth login` or HF_TOKEN for a repository that needs them; HF_ENDPOINT for another hub"
        ) from error
