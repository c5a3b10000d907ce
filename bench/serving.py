"""Shared by the serving benchmarks: a network of v2 widths, repositories that serve it, and the sampler's metrics."""

from __future__ import annotations

import dataclasses
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hunyuan3d_client import contract
from hunyuan3d_export.dit import PRESETS, random_model, save_checkpoint
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import Endpoints

BUILD = Path("build") / "bench"
SCALE = 5.0
# Triton demands the file name model.py, so the sampler's own model.py gets this name when _FORGETFUL takes its place.
_DEPLOYED_SAMPLER = "deployed_sampler"
_INSTANT = '''"""A denoiser that answers at once, or after a delay, so that only the sampler's own work is measured."""

import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep({delay_s})
        return [pb_utils.InferenceResponse([self._velocity(request)]) for request in requests]

    def _velocity(self, request):
        latents = pb_utils.get_input_tensor_by_name(request, "latents")
        return pb_utils.Tensor.from_dlpack("velocity", latents.to_dlpack())
'''


_FORGETFUL = f'''"""The sampler, except that it keeps no context from one step to the next."""

import {_DEPLOYED_SAMPLER}


class TritonPythonModel({_DEPLOYED_SAMPLER}.TritonPythonModel):
    contexts_held = 0
'''


def artifacts(guided_form: str = "bias") -> Path:
    """The ONNX graphs of one double and two single blocks of v2 widths, exported if they are missing or stale."""
    config = dataclasses.replace(PRESETS["v2-0"].config, depth=1, depth_single_blocks=2)
    checkpoint = BUILD / "few-blocks.safetensors"
    if not checkpoint.is_file():
        save_checkpoint(random_model(config, seed=3), checkpoint, dtype=torch.float32)
    out = BUILD / ("few-blocks" if guided_form == "bias" else f"few-blocks-{guided_form}")
    export_onnx(Weights(checkpoint=checkpoint), out, options=OnnxOptions(choices={"guided_form": guided_form}))
    return out


def repository() -> Path:
    """A model repository with the artifacts deployed."""
    deploy(artifacts(), BUILD / "repository")
    return BUILD / "repository"


def instant_repository(*, name: str, hold_context: bool, delay_s: float = 0.0) -> Path:
    """A repository whose guided denoiser answers with its latents after a delay, as a large network would.

    Without `hold_context` the context is copied again at every step.
    """
    folder = BUILD / name
    deploy(artifacts(), folder)
    (folder / contract.DIT_GUIDED / "1" / "model.py").write_text(_INSTANT.replace("{delay_s}", str(delay_s)))
    if not hold_context:
        model = folder / contract.SAMPLER / "1" / "model.py"
        model.replace(model.with_stem(_DEPLOYED_SAMPLER))  # moving the file is safe, because deploy has just written a new copy
        model.write_text(_FORGETFUL)
    return folder


def tokens(length: int, *, seed: int = 0, batch: int = 1) -> np.ndarray:
    """A context [B, T, 1536]."""
    return np.random.default_rng(seed).standard_normal((batch, length, contract.CONTEXT_WIDTH)).astype(np.float16)


def counters(endpoints: Endpoints) -> dict[str, float]:
    """The sampler's metrics, as 'name{labels}' -> value, without the prefix hunyuan3d_."""
    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=30) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("hunyuan3d_")]
    return {name.removeprefix("hunyuan3d_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def mean(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """The mean of a histogram's observations between two readings."""
    count = after[f"{name}_count"] - before[f"{name}_count"]
    return (after[f"{name}_sum"] - before[f"{name}_sum"]) / count if count else 0.0


def percentiles(times_s: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in seconds."""
    return {f"p{percent}": float(np.percentile(times_s, percent)) for percent in (50, 95, 99)}


def say(text: str) -> None:
    """Writes one line of progress to stderr, because stdout is for the result."""
    sys.stderr.write(text + "\n")
