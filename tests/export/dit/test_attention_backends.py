"""The network on each attention backend: how it chooses one, and that the velocity does not depend on it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.attention import BACKENDS, function
from hunyuan3d_export.dit import DiTConfig, Hunyuan3DDiT, load_checkpoint, random_model, save_checkpoint

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
ON_CPU = ("sdpa", "flash", "chunked", "standard")


def test_unknown_backend(narrow: DiTConfig) -> None:
    with pytest.raises(ValueError, match="got 'fast'"):
        Hunyuan3DDiT(narrow, attention_backend="fast")


@pytest.mark.usefixtures("no_sage")
def test_missing_package_is_named(narrow: DiTConfig) -> None:
    with pytest.raises(ImportError, match='Please install "sageattention"'):
        Hunyuan3DDiT(narrow, attention_backend="sage")


@pytest.mark.usefixtures("sage")
def test_environment_is_read_when_a_model_is_built(narrow: DiTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Hunyuan3DDiT(narrow).attention_backend == "sdpa"
    monkeypatch.setenv("USE_SAGEATTN", "1")
    assert Hunyuan3DDiT(narrow).attention_backend == "sage"
    assert random_model(narrow).attention_backend == "sage"
    assert (
        Hunyuan3DDiT(narrow, attention_backend="sdpa").attention_backend == "sdpa"
    )  # the caller's own choice wins over the environment
    for off in ("0", ""):
        monkeypatch.setenv("USE_SAGEATTN", off)
        assert Hunyuan3DDiT(narrow).attention_backend == "sdpa"
    monkeypatch.setenv("USE_SAGEATTN", "yes")
    with pytest.raises(ValueError, match="USE_SAGEATTN must be 0 or 1, got 'yes'"):
        Hunyuan3DDiT(narrow)


@pytest.mark.usefixtures("no_sage")
def test_environment_without_the_package(narrow: DiTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_SAGEATTN", "1")
    with pytest.raises(ImportError, match='(?s)Please install "sageattention".*unset USE_SAGEATTN'):
        Hunyuan3DDiT(narrow)


@pytest.mark.usefixtures("no_sage")
def test_import_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_SAGEATTN", "1")
    subprocess.run([sys.executable, "-c", "import hunyuan3d_export.dit"], check=True)


def test_dit_runs_its_plain_path_on_sage_and_its_bias_on_sdpa(
    narrow: DiTConfig, sage: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, draw: Draw
) -> None:
    # On a GPU, sage would refuse only the calls with a bias, so the stand-in refuses just these.
    takes_cpu = dataclasses.replace(BACKENDS["sage"], refusal=lambda _q, _k, _v, call: "no bias" if call.terms else None)
    monkeypatch.setattr(function, "BACKENDS", {**BACKENDS, "sage": takes_cpu})
    model, plain = random_model(narrow, attention_backend="sage"), random_model(narrow)
    latents, t, context = draw(narrow, 2, 9, 5)
    torch.testing.assert_close(model(latents, t, context), plain(latents, t, context))
    blocks = narrow.depth + narrow.depth_single_blocks
    assert len(sage) == blocks
    scale = torch.tensor([5.0, 2.0])
    torch.testing.assert_close(model.guided(latents, t, context, scale), plain.guided(latents, t, context, scale))
    assert len(sage) == 2 * blocks  # the unconditional branch has a bias, so only the other ran on sage
    torch.testing.assert_close(
        model.guided(latents, t, context, scale, form="repeat"), plain.guided(latents, t, context, scale)
    )
    assert len(sage) == 4 * blocks  # without a bias, both branches ran on sage


@pytest.mark.parametrize("backend", ON_CPU)
def test_dit_is_the_same_on_every_backend(
    backend: str, narrow: DiTConfig, distilled: DiTConfig, draw: Draw, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    scale = torch.tensor([5.0, -1.5], dtype=torch.float64)
    inputs = draw(narrow, 2, 19, 11, torch.float64)

    def velocities(name: str) -> list[Tensor]:
        base = random_model(narrow, dtype=torch.float64, attention_backend=name)
        embedded = random_model(distilled, dtype=torch.float64, attention_backend=name)
        assert base.attention_backend == name
        return [base(*inputs), base.guided(*inputs, scale), embedded(*inputs, scale)]

    for found, expected in zip(velocities(backend), velocities("standard"), strict=True):
        assert relative_error(found, expected) <= 1e-12


def test_dit_refuses_a_plain_call_its_backend_cannot_take(
    narrow: DiTConfig, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = dataclasses.replace(BACKENDS["flash"], refusal=lambda *_: "something else")
    monkeypatch.setattr(function, "BACKENDS", {**BACKENDS, "flash": never})
    with pytest.raises(ValueError, match="attention backend flash must get something else"):
        random_model(narrow, attention_backend="flash")(*draw(narrow, 1, 4, 3))


def test_loaded_model_takes_the_backend(narrow: DiTConfig, tmp_path: Path) -> None:
    save_checkpoint(random_model(narrow), tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path / "model.safetensors", attention_backend="chunked").attention_backend == "chunked"
    with pytest.raises(ValueError, match="got 'fast'"):
        load_checkpoint(tmp_path / "model.safetensors", attention_backend="fast")
