"""The settings of a check (device, presets, limits), and what the rows of one process share: networks and expected velocities."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..dit import PRESETS, Hunyuan3DDiT, random_model
from ..files import atomic_path
from ..precisions import PRECISIONS
from .paths import TWO_BATCH
from .stopwatch import Stopwatch

BATCHES = (1, 2, 8)

Kept = TypeVar("Kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The options of a check. It goes to the processes that measure, so it holds nothing but plain values.

    build: the folder of artifacts and reports. graphs: the folder of the graphs that gpu_check.graphs packed. work: a folder for
    files that the processes of this run share. steps: the steps of a sampling. attention_length: L of the attention rows.
    row_s: seconds for the timed calls of one row. Raises ValueError for a preset that does not exist or is guidance-distilled.
    """

    device: torch.device
    presets: tuple[str, ...]
    build: Path
    graphs: Path
    work: Path
    steps: int
    attention_length: int
    row_s: float

    def __post_init__(self) -> None:
        known = [name for name, preset in PRESETS.items() if not preset.config.guidance_embed]
        if unknown := [name for name in self.presets if name not in known]:
            raise ValueError(f"preset must be one of {', '.join(known)}, got {', '.join(unknown)}")

    @property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.device, self.row_s)

    @property
    def served_precision(self) -> str:
        """The precision of the exported and served networks: fp16 on a GPU, and fp32 on a CPU, where fp16 is slow."""
        return "fp16" if self.device.type == "cuda" else "fp32"


class OneAtATime:
    """Keeps the last object made, and frees it before it makes another, because two full-size networks may not fit.

    A failure is kept too and raised again for the same key, because a failed build may have taken minutes.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._kept: Any = None
        self._failure: Exception | None = None

    def get(self, key: object, make: Callable[[], Kept]) -> Kept:
        if key != self._key:
            self._key, self._kept, self._failure = key, None, None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                self._kept = make()
            except Exception as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure
        kept: Kept = self._kept
        return kept


class Networks:
    """The presets' torch models with seeded random weights on the device."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._whole, self._rounded = OneAtATime(), OneAtATime()

    def get(self, preset: str, precision: str) -> Hunyuan3DDiT:
        """The preset's network in this precision. The float32 network stays on the CPU, and all others are rounded from it."""
        config, device = PRESETS[preset].config, self._setting.device
        whole = self._whole.get(preset, lambda: random_model(config, attention_backend="sdpa"))
        return self._rounded.get((preset, precision), lambda: copy.deepcopy(whole).to(PRECISIONS[precision]).to(device))

    @torch.inference_mode()
    def expected(self, preset: str) -> Tensor:
        """The float32 velocities [2, L, C] of one sample with and without its context, on the CPU.

        The first process of a run that needs them computes them; the others read them from its file.
        """
        path = self._setting.work / f"{preset}-expected.pt"
        if not path.is_file():
            velocities = self.get(preset, "fp32")(**TWO_BATCH.inputs(PRESETS[preset], self._setting.device)).cpu()
            with atomic_path(path) as temporary:
                torch.save(velocities, temporary)
        expected: Tensor = torch.load(path, weights_only=True)
        return expected
