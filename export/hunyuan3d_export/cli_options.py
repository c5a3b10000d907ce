"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .dit import PRESETS

PresetOption = Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="A .safetensors or .ckpt file; without it, random weights of the preset.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the random weights.")]
