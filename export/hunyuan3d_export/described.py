"""What a config.yaml of the hub says about the weights beside it, where the weights themselves do not show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hunyuan3d_client.install import install_hint

from .dit import PRESETS

_NETWORK_SIZES = ("hidden_size", "depth", "depth_single_blocks")


@dataclasses.dataclass(frozen=True)
class Described:
    """preset: the variant of the denoiser. scale_factor, include_pi: of the VAE. None where the file does not say it."""

    preset: str | None = None
    scale_factor: float | None = None
    include_pi: bool | None = None


def read_described(config: Path | None) -> Described:
    """The facts in a config.yaml; no facts without a file. Raises ValueError for a damaged file or without the package pyyaml."""
    if config is None:
        return Described()
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ValueError(f"pyyaml must be installed to read {config}, got none\nhint: {install_hint('export')}") from error
    try:
        values = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{config} must be YAML, got: {first}\nhint: download it again, or remove it and pass --preset"
        ) from error
    # A VAE's own folder describes the VAE at the top; a pipeline's folder describes each part under its name.
    vae = _at(values, "vae") if _at(values, "vae") else values if _target(values) == "ShapeVAE" else None
    params = _at(vae, "params")
    scale_factor = _at(params, "scale_factor")
    return Described(
        preset=_preset(values) if _at(values, "model", "params") else None,
        scale_factor=float(scale_factor) if isinstance(scale_factor, int | float) else None,
        include_pi=bool(params.get("include_pi", True)) if isinstance(params, dict) else None,  # upstream's default is true
    )


def _preset(values: Any) -> str:
    """The preset of the published variant that these settings describe. Without a published size: that of v2-0 and its kin."""
    network = _at(values, "model", "params")
    mini = PRESETS["v2-mini"].config
    views = str(_at(values, "conditioner", "params", "main_image_encoder", "type") or "").endswith("MV")
    small = all(network.get(name) == getattr(mini, name) for name in _NETWORK_SIZES)
    family = "v2-mv" if views else "v2-mini" if small else "v2-0"
    if not network.get("guidance_embed"):
        return family
    return f"{family}-turbo" if _target(_at(values, "scheduler")).startswith("Consistency") else f"{family}-fast"


def _target(section: Any) -> str:
    """The name of the class that a section is for."""
    return str(_at(section, "target") or "").rpartition(".")[2]


def _at(values: Any, *names: str) -> Any:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values
