"""The weights of the models in this repository, read from the manifests that deployment writes beside their files."""

from __future__ import annotations

import json
from pathlib import Path

_MANIFEST = "manifest.json"


def deployed_weights(repository: Path, version: str) -> dict[str, dict[str, object]]:
    """Model -> preset, precision, sha256 of the checkpoint and seed, for each model whose file was deployed with a manifest."""
    found = {path.parent.parent.name: _weights(path) for path in sorted(repository.glob(f"*/{version}/{_MANIFEST}"))}
    return {model: weights for model, weights in found.items() if weights}


def _weights(manifest: Path) -> dict[str, object]:
    """What a manifest says; nothing for a file of another form, because a sampler must load without it too."""
    try:
        content = json.loads(manifest.read_text())
        made_from, weights = content["made_from"], content["made_from"]["weights"]
        return {
            "preset": content["serving"].get("name", ""),
            "precision": made_from["precision"],
            "sha256": weights.get("checkpoint_sha256", ""),
            "seed": weights.get("seed"),
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
