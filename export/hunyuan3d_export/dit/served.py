"""The denoiser's graphs as modules, and how the server's runtime `torch` loads one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..graphs import chosen_graph, whole
from .checkpoint import load_checkpoint
from .config import GUIDED_FORMS, Arithmetic
from .model import Hunyuan3DDiT


class Guided(nn.Module):
    """Hunyuan3DDiT.guided as the forward of a module."""

    def __init__(self, model: Hunyuan3DDiT) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        return self.model.guided(latents, t, context, guidance_scale)


MODULES: Mapping[str, Callable[[Hunyuan3DDiT], nn.Module]] = {"plain": whole, "guided": Guided}


def load(
    path: Path,
    graph: str,
    *,
    dtype: torch.dtype | None,
    attention_backend: str | None,
    choices: Mapping[str, str],
    device: torch.device,
) -> nn.Module:
    """The module of `graph`, plain or guided, with the weights of a checkpoint, for `device`. choices: guided_form alone.

    Raises CheckpointError for an unreadable file, ValueError for an unknown graph, backend or choice.
    """
    module, arithmetic = chosen_graph(MODULES, graph), _arithmetic(choices, device)
    model = load_checkpoint(path, dtype=dtype, attention_backend=attention_backend)
    model.arithmetic = arithmetic
    return module(model)


def _arithmetic(choices: Mapping[str, str], device: torch.device) -> Arithmetic:
    if set(choices) != {"guided_form"}:
        raise ValueError(f"choices must be guided_form, got {', '.join(choices) or 'none'}")
    return Arithmetic(guided_form=form_on(choices["guided_form"], device))


def form_on(guided_form: str, device: torch.device) -> str:
    """The form of the guided evaluation: bias, or repeat, which needs no attention mask, or auto: repeat on CUDA, whose fused
    attention kernels take no mask, and else bias. Raises ValueError for another."""
    if guided_form not in ("auto", *GUIDED_FORMS):
        raise ValueError(f"guided_form must be one of auto, {', '.join(GUIDED_FORMS)}, got {guided_form!r}")
    if guided_form != "auto":
        return guided_form
    return "repeat" if device.type == "cuda" else "bias"
