"""The settings of a check (device, presets, limits) and the presets' networks, which are kept in memory a few at a time."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hunyuan3d_client import contract

from ..dit import PRESETS, DiTConfig, Hunyuan3DDiT, Preset, compute, random_model
from ..dit.config import Arithmetic
from ..dit.network import example_inputs
from ..dit.weights import Weights
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..precisions import PRECISIONS
from .rows import Skip
from .stopwatch import Stopwatch

PATHS = tuple(path for path in contract.PATHS if path != "distilled")  # the paths of a base preset
GUIDANCE_SCALE = 5.0

Kept = TypeVar("Kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The options of a check.

    build: the folder where artifacts are looked for and made, as PRESET-PRECISION/. steps: the steps of a sampling.
    attention_length: L of the attention rows. row_s: seconds for the timed calls of one row.
    Raises ValueError for a preset that does not exist or is guidance-distilled.
    """

    device: torch.device
    presets: tuple[str, ...]
    build: Path
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

    @property
    def guided_form(self) -> str:
        """The form of the guided evaluation that this device serves: fused attention kernels of a GPU take no mask."""
        return "repeat" if self.device.type == "cuda" else "bias"


def flop(preset: Preset, path: str, precision: str, *, form: str = "bias") -> int:
    """Floating-point operations of one evaluation of one sample, at the preset's own sizes. form: of a guided evaluation."""
    sizes = {"latent_tokens": preset.num_latents, "context_tokens": preset.context_tokens}
    if path == "guided":
        null_tokens = compute.null_tokens(form, PRECISIONS[precision])
        return compute.guided(preset.config, **sizes, form=form, null_tokens=null_tokens).total
    return compute.plain(preset.config, **sizes).total * (2 if path == "two-batch" else 1)


def inputs_of(preset: Preset, path: str, device: torch.device) -> dict[str, Tensor]:
    """A path's inputs for one sample at the preset's own sizes; two-batch has a conditional and an unconditional row."""
    inputs = {name: value.to(device) for name, value in example_inputs((1, preset.num_latents, preset.context_tokens)).items()}
    if path == "two-batch":
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        inputs["context"][1] = 0
    if path == "guided":
        inputs["guidance_scale"] = torch.full((1,), GUIDANCE_SCALE, device=device)
    return inputs


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
        self._device, self._form = setting.device, setting.guided_form
        self._whole, self._rounded = OneAtATime(), OneAtATime()

    def get(self, preset: str, precision: str) -> Hunyuan3DDiT:
        """The preset's network in this precision. The float32 network is kept, and the other precisions are rounded from it."""
        config = PRESETS[preset].config
        whole = self._whole.get(preset, lambda: self._load(config))
        if precision == "fp32":
            return whole
        return self._rounded.get((preset, precision), lambda: copy.deepcopy(whole).to(PRECISIONS[precision]))

    def _load(self, config: DiTConfig) -> Hunyuan3DDiT:
        network = random_model(config, attention_backend="sdpa").to(self._device)
        network.arithmetic = Arithmetic(guided_form=self._form)
        return network


def onnx_artifacts(setting: Setting, preset: str) -> Path:
    """The folder with the preset's ONNX graphs. If onnxscript is installed, missing or stale graphs are exported first.

    Raises Skip when the folder is missing and onnxscript is not installed.
    """
    folder = setting.build / f"{preset}-{setting.served_precision}"
    if importlib.util.find_spec("onnxscript") is not None:
        choices = {"guided_form": setting.guided_form}
        export_onnx(Weights(preset=preset), folder, options=OnnxOptions(precision=setting.served_precision, choices=choices))
    elif not folder.is_dir():
        raise Skip(f"an ONNX export needs onnxscript, and {folder} is not there")
    return folder
