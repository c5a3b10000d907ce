"""Which weights are behind artifacts and behind the models of a repository, and whether these are the weights that were named."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from hunyuan3d_client import contract
from hunyuan3d_client.identity import ServedWeights

from .files import VERSION
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .networks import network_of

logger = logging.getLogger(__name__)


class AnotherDeployed(ValueError):
    """The repository holds other weights than those that were named."""


def is_random(identity: Mapping[str, Any]) -> bool:
    """Whether the weights with this identity (Source.identity) are random numbers."""
    return "checkpoint_sha256" not in identity


def weights_of(manifest: Manifest) -> ServedWeights:
    """The weights of an artifact, as a server tells them; the sampler in model_repository/ reads the same from a manifest."""
    weights = manifest.made_from["weights"]
    return ServedWeights(
        preset=manifest.serving.get("name", ""),
        precision=manifest.made_from["precision"],
        sha256=weights.get("checkpoint_sha256", ""),
        seed=weights.get("seed"),
    )


def deployed(repository: Path) -> dict[str, Manifest]:
    """Model -> manifest, for each model of a repository whose file was deployed."""
    folders = [path.parent for path in sorted(repository.glob(f"*/{VERSION}/{MANIFEST}"))]
    return {folder.parent.name: Manifest.read(folder, hint="deploy it again") for folder in folders}


def described(manifests: Iterable[Manifest]) -> list[str]:
    """A line for each network: its title and its weights. Random weights are told in capitals."""
    lines = {f"{network_of(manifest.model).title}: {weights_of(manifest)}": None for manifest in manifests}
    return list(lines)


def warn_of_random(manifests: Iterable[Manifest]) -> None:
    """Logs a warning for artifacts of random weights."""
    random = [manifest for manifest in manifests if is_random(manifest.made_from["weights"])]
    for line in described(random):
        logger.warning("%s: its results are noise; hint: --checkpoint, or for make: CHECKPOINT=", line)


def check_deployed(
    repository: Path, wanted: Mapping[str, str], *, preset: str | None = None, precision: str | None = None
) -> None:
    """Raises AnotherDeployed when `repository` holds other weights than those that were named.

    wanted: title of a network -> sha256 of the checkpoint that was named. preset, precision: None for any.
    """
    models = deployed(repository)
    found = {network_of(model).title: manifest for model, manifest in models.items()}
    (denoiser,) = {network_of(model).title for model in contract.DENOISERS}
    for title, digest in wanted.items():
        if title not in found or weights_of(found[title]).sha256 != digest:
            _refuse(repository, title, f"weights {digest[:12]}", found)
    weights = weights_of(found[denoiser]) if denoiser in found else None
    if preset is not None and (weights is None or weights.preset != preset):
        _refuse(repository, denoiser, preset, found)
    if precision is not None and (weights is None or weights.precision != precision):
        _refuse(repository, denoiser, precision, found)


def _refuse(repository: Path, title: str, wanted: str, found: Mapping[str, Manifest]) -> NoReturn:
    holds = str(weights_of(found[title])) if title in found else "none"
    raise AnotherDeployed(
        f"the {title} in {repository} must be {wanted}, found {holds}\n"
        "hint: deploy these weights first, or name none to serve what is deployed"
    )
