"""The source of a decoder's weights (a checkpoint, or seeded random numbers), and the facts that the weights do not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..checkpoints import CheckpointError
from ..dit.weights import CUSTOM
from ..dit.weights import Weights as DiTWeights
from ..files import sha256
from .checkpoint import load_checkpoint, random_model, read_config
from .config import PRESETS, ShapeVAEPreset
from .model import ShapeVAEDecoder

# The presets whose weights are part of this package instead of random.
SHIPPED: Mapping[str, Path] = {"shapes": Path(__file__).with_name("shapes.safetensors")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeVAESource:
    """A source of weights: `path`, a file that holds a VAE; else those shipped with `preset`; else random ones from `seed`.

    preset: whose facts belong to the weights (ShapeVAEPreset); a file that also holds a base DiT shows its own.
    scale_factor, include_pi: replace the preset's.

    Raises ValueError for an unknown preset, and without both preset and path.
    """

    network: ClassVar[str] = "vae"

    path: Path | None = None
    preset: str | None = None
    seed: int = 0
    scale_factor: float | None = None
    include_pi: bool | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.preset is None and self.path is None:
            raise ValueError("VAE must come from a preset or a checkpoint, got neither\nhint: pass --preset or --checkpoint")

    @property
    def checkpoint(self) -> Path | None:
        return self.path

    @property
    def file(self) -> Path | None:
        """The file that these weights are read from; None for random weights."""
        return self.path or SHIPPED.get(str(self.preset))

    def identity(self) -> dict[str, Any]:
        """JSON that identifies the weights and the facts that the graphs contain beside them.

        Raises FileNotFoundError when their file is missing, ValueError as serving() does.
        """
        if self.file is not None and not self.file.is_file():
            raise FileNotFoundError(f"checkpoint must be a file, found nothing at {self.file}")
        shipped = {"preset": self.preset} if self.path is None else {}
        weights = {**shipped, "checkpoint_sha256": sha256(self.file)} if self.file else {**shipped, "seed": self.seed}
        facts = self._facts()
        return {**weights, "scale_factor": facts.scale_factor, "include_pi": facts.include_pi}

    def serving(self) -> ShapeVAEPreset:
        """The facts that deployment needs.

        Raises CheckpointError for an unreadable file, ValueError when neither a preset nor the file shows the scale factor.
        """
        facts = self._facts()
        if self.file is None:
            return facts
        config = read_config(self.file)
        return facts if config == facts.config else dataclasses.replace(facts, name=CUSTOM, config=config)

    def load(self, dtype: torch.dtype, *, attention_backend: str = "sdpa") -> ShapeVAEDecoder:
        """The decoder in this dtype, in eval mode on the CPU."""
        facts = self._facts()
        if self.file is None:
            return random_model(
                facts.config, self.seed, include_pi=facts.include_pi, dtype=dtype, attention_backend=attention_backend
            )
        return load_checkpoint(self.file, include_pi=facts.include_pi, dtype=dtype, attention_backend=attention_backend)

    def _facts(self) -> ShapeVAEPreset:
        """The preset that was named, or else the preset of the DiT in the same file, with what this source replaces."""
        facts = PRESETS[self.preset or self._preset_of_the_dit()]
        given = {"scale_factor": self.scale_factor, "include_pi": self.include_pi}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(facts, **changes)

    def _preset_of_the_dit(self) -> str:
        if self.scale_factor is not None:
            return "v2-0"  # the scale factor is all that the presets' facts differ in
        try:
            found = DiTWeights(checkpoint=self.path).serving().name
        except CheckpointError as error:
            raise ValueError(
                f"preset must be named for {self.path}, because a VAE's weights do not show the scale factor of its latents\n"
                f"hint: pass --preset with one of {', '.join(PRESETS)}"
            ) from error
        if found not in PRESETS:
            raise ValueError(f"preset must be named for {self.path}, whose DiT has no published size\nhint: pass --preset")
        return found
