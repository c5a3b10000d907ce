"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hunyuan3d_client.files import DiskFull, atomic_path, naming_a_full_disk

__all__ = [
    "CHECKPOINT_FILE",
    "ONNX_FILE",
    "PLAN_FILE",
    "RTX_PLAN_FILE",
    "VERSION",
    "DiskFull",
    "atomic_folder",
    "atomic_path",
    "naming_a_full_disk",
    "new_folders",
    "separate",
    "sha256",
]

# The only version folder of a model. server/loadable.py has its own, because the container runs that file without this package.
VERSION = "1"
# Triton's backends expect these names in a version folder, so the artifact folders use them too.
ONNX_FILE = "model.onnx"
PLAN_FILE = "model.plan"
# A name of its own, so that a server cannot hand a plan of TensorRT for RTX to Triton's TensorRT backend.
RTX_PLAN_FILE = "model.rtx.plan"
CHECKPOINT_FILE = "checkpoint.safetensors"
_CHUNK_BYTES = 1 << 22


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`. On success the folder replaces `path`; on any error it is removed, with the
    folders around it that were made for it. Raises DiskFull where there is no space.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with new_folders(path.parent):
        try:
            with naming_a_full_disk(path):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                yield temporary
                _replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, path: Path) -> None:
    retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
    if path.exists():
        path.replace(retired)
    try:
        temporary.replace(path)
    except BaseException:
        if retired.exists():
            retired.replace(path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def new_folders(*paths: Path) -> Iterator[None]:
    """Makes folders. On any error of the body, those that did not exist before and are empty are removed, outermost last."""
    missing = {folder for path in paths for folder in (path, *path.parents) if not folder.exists()}
    try:
        for path in paths:
            with naming_a_full_disk(path):
                path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in sorted(missing, key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                folder.rmdir()
        raise


def separate(destination: Path, *sources: Path) -> Path:
    """Returns `destination`. Raises ValueError when it is one of `sources`, because writing would replace that source."""
    if destination.resolve() in [source.resolve() for source in sources]:
        raise ValueError(
            f"out must be another folder than what is read, got {destination.parent} for both\nhint: another --out"
        )
    return destination


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
