"""The JSON beside every artifact: what it was made from, by what, and the digests that prove it whole."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import atomic_path, sha256

NAME = "manifest.json"
FORMAT = 1


class ManifestError(ValueError):
    """The artifact has no manifest, or its files are not the ones the manifest describes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """`made_from` decides whether an artifact can be reused: equal values would give an equal artifact.

    model is the Triton model that the artifact belongs to. made_from holds the weights' identity, the graph's tensors and axes,
    the options and a digest of the code. serving holds what deployment needs to know: the network's own dataclass as JSON (read
    it by Network.serving). files maps names to sha256. tensors says what a plan's builder was given: dtype, shape and profile
    of every input, dtype and shape of every output.
    """

    model: str
    made_from: Mapping[str, Any]
    serving: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        with atomic_path(folder / NAME) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path, *, hint: str) -> Manifest:
        """The manifest in `folder`, not yet held against the files.

        Raises ManifestError, ending in `hint`, when there is none or it is not one of ours.
        """
        path = folder / NAME
        try:
            manifest = cls(**json.loads(path.read_bytes()))
            manifest._check_fields()
        except FileNotFoundError as error:
            raise ManifestError(f"{folder} must hold a {NAME}, found none\nhint: {hint}") from error
        except (ValueError, TypeError) as error:  # not JSON, not text, or not our fields
            raise ManifestError(f"{path} must be a manifest of format {FORMAT}, got: {error}\nhint: {hint}") from error
        return manifest

    def _check_fields(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format!r}")
        for field in ("made_from", "serving", "versions", "files", "tensors"):
            if not isinstance(getattr(self, field), dict):
                raise ValueError(f"{field} {getattr(self, field)!r}")
        # Names become paths in a model repository: one that leads elsewhere must not.
        for name in (self.model, *self.files):
            if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"the name {name!r}")
        if not self.files:
            raise ValueError("no files")

    def check_files(self, folder: Path, *, hint: str) -> None:
        """Raises ManifestError when a file is missing or is not, byte for byte, the one described."""
        for name, digest in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ManifestError(f"{folder} must hold {name}, found none\nhint: {hint}")
            if (found := sha256(path)) != digest:
                raise ManifestError(f"{path} must have sha256 {digest[:12]}..., got {found[:12]}...\nhint: {hint}")


def read_artifacts(root: Path, *, hint: str | Callable[[str], str]) -> dict[Path, Manifest]:
    """Every artifact folder below `root` with its manifest, each held against its files; folders are named by their models.

    Raises ManifestError, ending in `hint` (of the model that it is about, or "" for none), when there is no artifact or one of
    them does not match.
    """
    hint_for = hint if callable(hint) else lambda _model: hint
    # A hidden folder is what a killed export left behind.
    folders = sorted(path.parent for path in root.glob(f"*/{NAME}") if not path.parent.name.startswith("."))
    if not folders:
        raise ManifestError(f"{root} must hold artifact folders with a {NAME}, found none\nhint: {hint_for('')}")
    manifests = {folder: Manifest.read(folder, hint=hint_for(folder.name)) for folder in folders}
    for folder, manifest in manifests.items():
        if folder.name != manifest.model:
            raise ManifestError(
                f"{folder} must be named {manifest.model}, as its {NAME} says\nhint: {hint_for(manifest.model)}"
            )
        manifest.check_files(folder, hint=hint_for(folder.name))
    return manifests


def reusable(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a whole artifact made from exactly this."""
    try:
        manifest = Manifest.read(folder, hint="")
        if manifest.made_from != made_from:
            return False
        manifest.check_files(folder, hint="")
    except ManifestError:
        return False
    return True


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in `folder` but the manifest."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != NAME}


def versions_of(*distributions: str) -> dict[str, str]:
    """The installed versions of these distributions; those that are not installed are left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_digest(paths: Iterable[Path]) -> str:
    """One sha256 over source files, so that an artifact of older code is seen as stale."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
