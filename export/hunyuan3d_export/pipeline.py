"""One checkpoint, one pipeline: the sources of all networks that the weights which the user named hold."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hunyuan3d_client.install import install_hint

from .checkpoint_files import CheckpointFiles, find_files, is_hub_id
from .checkpoints import read_state
from .conditioner.config import IMAGE_SIZES, PATCH, VIEWS
from .conditioner.weights import SHIPPED as SHIPPED_CONDITIONERS
from .conditioner.weights import ConditionerSource
from .described import Described, read_described
from .dit import PRESETS
from .dit.weights import CUSTOM, Weights
from .graphs import Source
from .networks import NETWORKS, check_names
from .shapevae.weights import ShapeVAESource

# Network -> a key that its weights have, in every layout that its checkpoint module reads. A network that is missing here is never
# part of a checkpoint.
PROBES: Mapping[str, re.Pattern[str]] = {
    "dit": re.compile(r"(model\.)?latent_in\.weight"),
    "conditioner": re.compile(r"(.*\.)?embeddings\.cls_token"),
    "vae": re.compile(r"(.*\.)?(post_kl|geo_decoder)\..*"),
}
_MISSING_HINTS = {
    "vae": "--vae FILE adds the file or folder of a VAE, such as hunyuan3d-vae-v2-0",
    "background": "its graph comes from a file of its own: hunyuan3d-export background",
}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """What the user named. checkpoint: a file, a folder or an id on the hub; None: the weights shipped with `preset`, or random
    ones from `seed`.

    subfolder: the folder of the weights inside the checkpoint. vae: a VAE's file or folder, or its folder in the same repository on
    the hub; it replaces the checkpoint's own. networks: the networks that are wanted; empty: all that the weights hold or, for
    random weights, the denoiser. All three networks are shipped with the preset `shapes`.
    """

    checkpoint: Path | None = None
    subfolder: str | None = None
    vae: Path | None = None
    preset: str | None = None
    seed: int = 0
    networks: tuple[str, ...] = ()

    @property
    def has_weights(self) -> bool:
        """Whether the user named any weights: a seed and networks alone name none."""
        return bool(self.checkpoint or self.subfolder or self.vae or self.preset)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """name: of the weights, for folders that are made from them. sources: network -> the source of its weights."""

    name: str
    sources: Mapping[str, Source]


def find_pipeline(named: Named) -> Pipeline:
    """The sources of the wanted networks, in the order of NETWORKS.

    Raises FileNotFoundError when a file is missing, CheckpointError for a damaged one, ValueError for an unknown network or
    preset, for a network that the checkpoint does not hold, and when nothing shows the variant of guidance-distilled weights.
    """
    check_names(named.networks)
    if named.subfolder and named.checkpoint is None:
        raise ValueError(f"subfolder must come with a checkpoint, got {named.subfolder} alone\nhint: --checkpoint")
    vae = None if named.vae is None else _find_vae(named, named.vae)
    if named.checkpoint is None:
        return Pipeline(str(named.preset), _without_checkpoint(named, vae))
    files = find_files(named.checkpoint, named.subfolder)
    described = read_described(files.config)
    held = held_networks(files.weights)
    wanted = _wanted(named, files, held, vae)
    preset = named.preset or described.preset
    if named.preset is not None and "dit" in wanted:
        Weights(preset=named.preset, checkpoint=files.weights).check_named_preset()
    found: dict[str, Source] = {"dit": Weights(preset=preset, checkpoint=files.weights)}
    if "vae" in wanted:
        usual = (
            _usual_preset(files, held) if vae and preset is None else preset
        )  # a file with both shows it to the source itself
        found["vae"] = _vae(vae or files, usual, described)
    found["conditioner"] = ConditionerSource(path=files.weights, **encoder_sizes(preset))
    return Pipeline(files.name, {name: found[name] for name in NETWORKS if name in wanted})


def held_networks(path: Path) -> list[str]:
    """The networks whose weights a checkpoint file holds. Raises CheckpointError for a damaged file."""
    keys: list[str] = []

    def remember(names: list[str], _get: object, _path: Path) -> dict[str, Tensor]:
        keys.extend(names)
        return {}

    read_state(path, remember)
    return [name for name, probe in PROBES.items() if any(probe.fullmatch(key) for key in keys)]


def encoder_sizes(preset: str | None) -> dict[str, Any]:
    """The picture's side and the number of views that give the preset's number of context tokens; else those of v2-0."""
    tokens = PRESETS[preset].context_tokens if preset is not None and preset in PRESETS else None
    for size in IMAGE_SIZES:
        for views in VIEWS:
            if views * (1 + (size // PATCH) ** 2) == tokens:
                return {"image_size": size, "views": views}
    return {"image_size": IMAGE_SIZES[0], "views": VIEWS[0]}


def _wanted(named: Named, files: CheckpointFiles, held: list[str], vae: CheckpointFiles | None) -> list[str]:
    """The networks to make. Weights of no network at all are left to the denoiser's reader, whose error says what they are."""
    available = [*held, *(["vae"] if vae and "vae" not in held else [])] or ["dit"]
    for name in named.networks:
        if name not in available:
            hint = _MISSING_HINTS.get(name, f"--network with one of {', '.join(available)}")
            raise ValueError(
                f"{files.weights} must hold the weights of the {NETWORKS[name].title}, found those of {', '.join(held) or 'no network'}\nhint: {hint}"
            )
    if named.networks:
        return list(named.networks)
    if "conditioner" in available and importlib.util.find_spec("transformers") is None:
        others = " ".join(f"--network {name}" for name in available if name != "conditioner")
        raise ValueError(
            f"transformers must be installed for the {NETWORKS['conditioner'].title} of {files.weights}, got none\n"
            f"hint: {install_hint('export,conditioner')}, or leave it out: {others}"
        )
    if "vae" not in available and len(available) > 1:
        logger.warning("%s holds no %s; hint: %s", files.weights, NETWORKS["vae"].title, _MISSING_HINTS["vae"])
    return available


def _find_vae(named: Named, vae: Path) -> CheckpointFiles:
    if not vae.exists() and named.checkpoint is not None and is_hub_id(named.checkpoint):
        return find_files(named.checkpoint, vae.as_posix())
    return find_files(vae)


def _vae(files: CheckpointFiles, preset: str | None, beside: Described) -> ShapeVAESource:
    """beside: what the config.yaml of the DiT says, where the VAE has none of its own."""
    own = read_described(files.config)
    described = own if own.scale_factor is not None else beside
    known = described.scale_factor is not None
    return ShapeVAESource(
        path=files.weights,
        preset=preset,
        scale_factor=described.scale_factor,
        include_pi=described.include_pi if known else None,
    )


def _usual_preset(files: CheckpointFiles, held: list[str]) -> str | None:
    """The preset that base weights of a published size belong to. Others have none."""
    if "dit" not in held:
        return None
    found = str(Weights(checkpoint=files.weights).serving().name)
    return None if found == CUSTOM else found


def _without_checkpoint(named: Named, vae: CheckpointFiles | None) -> dict[str, Source]:
    """The weights that are shipped with a preset, or random ones; the VAE may come from a file."""
    wanted = named.networks or _usual_networks(named.preset, with_vae=vae is not None)
    found: dict[str, Source] = {}
    for name in wanted:
        if name not in PROBES:
            raise ValueError(
                f"network must be one of {', '.join(PROBES)} for a preset, got {name}\nhint: {_MISSING_HINTS[name]}"
            )
        if name == "conditioner":
            found[name] = _conditioner(named)
        elif name == "vae":
            found[name] = _vae(vae, named.preset, Described()) if vae else ShapeVAESource(preset=named.preset, seed=named.seed)
        else:
            found[name] = Weights(preset=named.preset, seed=named.seed)
    return {name: found[name] for name in NETWORKS if name in found}


def _conditioner(named: Named) -> ConditionerSource:
    if named.preset is not None and named.preset in SHIPPED_CONDITIONERS:
        return ConditionerSource.shipped(named.preset)
    variant = "tiny" if named.preset in (None, "tiny") else "giant"
    return ConditionerSource(variant=variant, seed=named.seed, **encoder_sizes(named.preset))


def _usual_networks(preset: str | None, *, with_vae: bool) -> tuple[str, ...]:
    """The networks that are made where the user named none."""
    if preset in SHIPPED_CONDITIONERS:
        if importlib.util.find_spec("transformers") is None:
            logger.warning(
                "%s is made without its %s, because transformers is not installed; hint: %s",
                preset,
                NETWORKS["conditioner"].title,
                install_hint("export,conditioner"),
            )
            return ("dit", "vae")
        return ("dit", "conditioner", "vae")
    if not with_vae:
        return ("dit",)
    return ("vae",) if preset is None else ("dit", "vae")
