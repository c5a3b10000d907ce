"""The source of weights (a checkpoint file, or seeded random numbers), and the sampling defaults that belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from hunyuan3d_client import contract

from ..files import sha256
from .checkpoint import load_checkpoint, random_model, read_config
from .config import PRESETS, DiTConfig, Preset
from .model import Hunyuan3DDiT

CUSTOM = "custom"
# The presets whose weights are part of this package instead of random.
SHIPPED: Mapping[str, Path] = {"shapes": Path(__file__).with_name("shapes.safetensors")}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A source of weights: `checkpoint`; else the weights that are shipped with `preset`; else random weights from `seed`."""

    network: ClassVar[str] = "dit"

    preset: str | None = None
    checkpoint: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.preset is None and self.checkpoint is None:
            raise ValueError(
                "weights must come from a preset or a checkpoint, got neither\nhint: pass --preset or --checkpoint"
            )

    @property
    def file(self) -> Path | None:
        """The checkpoint file that these weights are read from; None for random weights."""
        return self.checkpoint or SHIPPED.get(str(self.preset))

    def identity(self) -> dict[str, Any]:
        """JSON that identifies the weights: the preset, and the file's digest or the seed."""
        if self.file is None:
            return {"preset": self.preset, "seed": self.seed}
        if not self.file.is_file():
            raise FileNotFoundError(f"checkpoint must be a file, found nothing at {self.file}")
        return {"preset": self.preset, "checkpoint_sha256": sha256(self.file)}

    def config(self) -> DiTConfig:
        """The config of the network. The tensors of a checkpoint stay on disk."""
        return read_config(self.file) if self.file else PRESETS[str(self.preset)].config

    def load(self, dtype: torch.dtype, *, attention_backend: str = "sdpa") -> Hunyuan3DDiT:
        """The model in this dtype, in eval mode on the CPU."""
        if self.file is None:
            return random_model(PRESETS[str(self.preset)].config, self.seed, dtype=dtype, attention_backend=attention_backend)
        return load_checkpoint(self.file, dtype=dtype, attention_backend=attention_backend)

    def serving(self) -> Preset:
        """The facts that deployment needs: the sampling defaults for the network that these weights belong to."""
        return self.sampling(self.config())

    def sampling(self, config: DiTConfig) -> Preset:
        """The sampling defaults for these weights, whose network is `config`.

        Without a preset, a base model has the defaults of the published variant of equal size, or else those of v2-0. Weights
        do not show whether a model is a turbo or a fast one, so guidance-distilled weights need a preset.

        Raises ValueError when the preset's network and the weights contradict each other.
        """
        widths = (config.in_channels, config.context_in_dim)
        if widths != (contract.LATENT_CHANNELS, contract.CONTEXT_WIDTH):
            expected = f"{contract.LATENT_CHANNELS} latent channels and context width {contract.CONTEXT_WIDTH}"
            raise ValueError(f"weights must have {expected}, got {widths[0]} and {widths[1]}")
        if self.preset is not None:
            return self._checked(PRESETS[self.preset], config)
        if config.guidance_embed:
            names = ", ".join(name for name, preset in PRESETS.items() if preset.config.guidance_embed)
            raise ValueError(
                f"preset must be named for guidance-distilled weights, got none\nhint: pass --preset with one of {names}"
            )
        same_size = [preset for preset in PRESETS.values() if preset.config == config]
        return same_size[0] if same_size else dataclasses.replace(PRESETS["v2-0"], name=CUSTOM, config=config)

    def check_named_preset(self) -> None:
        """Raises ValueError when the preset, which the user named, is that of weights of another size.

        Distilled weights of a size that was never published may take the name of any distilled preset, because nothing else
        says whether they are turbo or fast weights.
        """
        if self.preset is None or self.file is None:
            return
        named, config = PRESETS[self.preset], self.config()
        fitting = [name for name, preset in PRESETS.items() if preset.config == config]
        if named.config != config and (fitting or not config.guidance_embed):
            found = f"the size of {' or '.join(fitting)}" if fitting else "a size that was never published"
            raise ValueError(
                f"preset must fit the weights, got {named.name} for {self.file}, which has {found} (width {config.hidden_size}, "
                f"{config.depth} double and {config.depth_single_blocks} single blocks)\n"
                "hint: leave --preset out (for make: PRESET), or name the variant"
            )

    def _checked(self, preset: Preset, config: DiTConfig) -> Preset:
        if preset.config.guidance_embed != config.guidance_embed:
            kind = "guidance-distilled" if config.guidance_embed else "base"
            raise ValueError(
                f"preset must fit the weights, got {preset.name} for {kind} weights\nhint: leave --preset out, or name the variant"
            )
        return preset if preset.config == config else dataclasses.replace(preset, name=CUSTOM, config=config)
