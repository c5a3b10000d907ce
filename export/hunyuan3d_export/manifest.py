"""The JSON file beside every artifact: its sources, the versions of the tools that made it, and the digests of its files."""

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
    the options and a digest of the code. serving holds the facts that deployment needs: the network's own dataclass as JSON,
    which Network.serving reads. files maps names to sha256. tensors describes a plan: dtype, shape and profile of every input,
    dtype and shape of every output. memory is a plan's engines.memory.PlanMemory as JSON.
    """

    model: str
    made_from: Mapping[str, Any]
    serving: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        with atomic_path(folder / NAME) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path, *, hint: str) -> Manifest:
        """The manifest in `folder`. Its digests are not compared with the files yet; see check_files.

        Raises ManifestError, which ends in `hint`, when the file is missing or is not a manifest of this format.
        """
        path = folder / NAME
        try:
            manifest = cls(**json.loads(path.read_bytes()))
            manifest._check_fields()
        except FileNotFoundError as error:
            raise ManifestError(f"{folder} must hold a {NAME}, found none\nhint: {hint}") from error
        except (ValueError, TypeError) as error:  # neither JSON nor text, or other fields than ours
            raise ManifestError(f"{path} must be a manifest of format {FORMAT}, got: {error}\nhint: {hint}") from error
        return manifest

    def _check_fields(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format!r}")
        for field in ("made_from", "serving", "versions", "files", "tensors", "memory"):
            if not isinstance(getattr(self, field), dict):
                raise ValueError(f"{field} {getattr(self, field)!r}")
        # Names become paths in a model repository, so none of them may lead out of its folder.
        for name in (self.model, *self.files):
            if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"the name {name!r}")
        if not self.files:
            raise ValueError("no files")

    def check_files(self, folder: Path, *, hint: str) -> None:
        """Raises ManifestError when a file is missing or its digest differs from the manifest's."""
        for name, digest in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ManifestError(f"{folder} must hold {name}, found none\nhint: {hint}")
            if (found := sha256(path)) != digest:
                raise ManifestError(f"{path} must have sha256 {digest[:12]}..., got {found[:12]}...\nhint: {hint}")


def read_artifacts(root: Path, *, hint: str | Callable[[str], str]) -> dict[Path, Manifest]:
    """Every artifact folder below `root` with its manifest. Each folder must be named by its model, and its files must match.

    Raises ManifestError when there is no artifact or when one does not match its manifest. The error ends in `hint`; a callable
    hint is given the name of the model, or "" when there is no artifact.
    """
    hint_for = hint if callable(hint) else lambda _model: hint
    # An export that was killed leaves a hidden folder behind.
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
    """Whether `folder` holds an undamaged artifact whose manifest has exactly this `made_from`."""
    try:
        manifest = Manifest.read(folder, hint="")
        if manifest.made_from != made_from:
            return False
        manifest.check_files(folder, hint="")
    except ManifestError:
        return False
    return True


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in `folder` except the manifest."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != NAME}


def versions_of(*distributions: str) -> dict[str, str]:
    """The installed versions of these distributions; a distribution that is not installed is left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_digest(paths: Iterable[Path]) -> str:
    """One sha256 over source files, so that an artifact made by older code counts as stale."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
