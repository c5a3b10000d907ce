"""What `serve` says once the server is ready: where it is, what it serves, and a command to try."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hunyuan3d_client import contract

from ..identity import deployed, described, weights_of
from ..manifest import Manifest
from ..server.embedded import Endpoints
from ..server.loadable import loadable

_SHAPES = "shapes"


def summary(repository: Path, config: str, endpoints: Endpoints) -> list[str]:
    """Short lines for a person."""
    models = [folder.name for folder in loadable(repository, config).models]
    manifests = {model: manifest for model, manifest in deployed(repository).items() if model in models}
    return [
        f"ready at {endpoints.grpc} (gRPC) and {endpoints.http} (HTTP)",
        f"serves {repository}, runtime {config}: {'; '.join(described(manifests.values())) or 'models without a manifest'}",
        f"try: {_command(models, manifests.values())} --url {endpoints.grpc}",
    ]


def _command(models: list[str], manifests: Iterable[Manifest]) -> str:
    """A command of the client that these models answer."""
    if contract.SAMPLER not in models:
        return "hunyuan3d health"
    meshed = contract.MESH in models
    if any(manifest.model in contract.DENOISERS and weights_of(manifest).preset == _SHAPES for manifest in manifests):
        return 'hunyuan3d sample --prompt "two flat tori" --out ' + ("tori.glb" if meshed else "latents.npy --ply tori.ply")
    if contract.IMAGE_CONTEXT in models:
        return "hunyuan3d generate picture.png --steps 10 --out " + ("mesh.glb" if meshed else "latents.npy")
    return "hunyuan3d sample --context context.npy --steps 10 --out latents.npy"
