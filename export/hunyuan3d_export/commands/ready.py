"""What `serve` says once the server is ready: where it is, what it serves, and a command to try."""

from __future__ import annotations

from pathlib import Path

from hunyuan3d_client import contract

from ..manifest import NAME as MANIFEST
from ..manifest import Manifest
from ..networks import NETWORKS
from ..server.embedded import Endpoints
from ..server.loadable import VERSION, loadable

_SHAPES = "shapes"


def summary(repository: Path, config: str, endpoints: Endpoints) -> list[str]:
    """Short lines for a person."""
    models = [folder.name for folder in loadable(repository, config).models]
    deployed = _deployed(repository, models)
    names = [f"{label} {precision}" for label, precision in deployed]
    return [
        f"ready at {endpoints.grpc} (gRPC) and {endpoints.http} (HTTP)",
        f"serves {', '.join(names) or 'models without a manifest'} from {repository}, runtime {config}",
        f"try: {_command(models, [label for label, _ in deployed])} --url {endpoints.grpc}",
    ]


def _deployed(repository: Path, models: list[str]) -> list[tuple[str, str]]:
    """The name and the precision of each deployed network, in the order of NETWORKS."""
    found = []
    for network in NETWORKS.values():
        folders = [repository / model / VERSION for model in network.models if model in models]
        if folder := next((each for each in folders if (each / MANIFEST).is_file()), None):
            manifest = Manifest.read(folder, hint="deploy it again with: hunyuan3d-export deploy")
            found.append((network.label(network.serving(manifest)), manifest.made_from["precision"]))
    return found


def _command(models: list[str], labels: list[str]) -> str:
    """A command of the client that these models answer."""
    if contract.SAMPLER not in models:
        return "hunyuan3d health"
    if contract.IMAGE_CONTEXT in models:
        return "hunyuan3d generate picture.png --steps 10 --out latents.npy"
    if _SHAPES in labels:
        return 'hunyuan3d sample --prompt "two flat tori" --out latents.npy --ply tori.ply'
    return "hunyuan3d sample --context context.npy --steps 10 --out latents.npy"
