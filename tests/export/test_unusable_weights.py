"""Weights that load but cannot be used: NaN is refused by the tensor's name, code in a pickle without torch's advice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hunyuan3d_export.checkpoints import CheckpointError, check_finite
from hunyuan3d_export.conditioner.checkpoint import random_conditioner
from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.shapevae import PRESETS, random_model, save_checkpoint
from hunyuan3d_export.shapevae.weights import ShapeVAESource


def dit(folder: Path, micro: Any) -> tuple[Path, str, Callable[[Path], Any]]:
    path = folder / "dit.safetensors"
    path.write_bytes(micro.checkpoint.read_bytes())
    return path, "double_blocks.0.img_mod.lin.weight", lambda path: Weights(checkpoint=path)


def vae(folder: Path, _micro: Any) -> tuple[Path, str, Callable[[Path], Any]]:
    path = folder / "vae.safetensors"
    save_checkpoint(random_model(PRESETS["tiny"].config), path, dtype=None)
    return path, "post_kl.bias", lambda path: ShapeVAESource(path=path, preset="tiny")


def conditioner(folder: Path, _micro: Any) -> tuple[Path, str, Callable[[Path], Any]]:
    pytest.importorskip("transformers", reason="the image encoder needs transformers")
    path = folder / "encoder.safetensors"
    save_file({key: value.contiguous() for key, value in random_conditioner("tiny").dinov2.state_dict().items()}, path)
    return path, "layernorm.weight", lambda path: ConditionerSource(path=path)


@pytest.mark.parametrize("network", [dit, vae, conditioner])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["NaN", "Inf"])
def test_a_weight_that_is_no_number_is_refused_by_name(network: Any, value: float, micro: Any, tmp_path: Path) -> None:
    path, key, source = network(tmp_path, micro)
    state = load_file(path)
    (full,) = (name for name in state if name.endswith(key))
    state[full].view(-1)[1] = value
    save_file(state, path)
    with pytest.raises(CheckpointError, match=f"{path} must hold finite weights, got NaN or Inf in {key}\nhint: get the file"):
        source(path).load(torch.float32)
    source(path).serving()  # the sizes can be read all the same


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    count=st.integers(0, 2**19),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_value_that_is_no_number_is_found(dtype: torch.dtype, count: int, data: st.DataObject) -> None:
    largest = torch.finfo(dtype).max
    weights = torch.tensor([largest, -largest, torch.finfo(dtype).tiny, -0.0], dtype=dtype).repeat(count // 4 + 1)[:count]
    check_finite({"a": weights, "b": torch.tensor([1])}, Path("file"))
    if count:
        place = data.draw(st.one_of(st.integers(0, count - 1), st.just(count - 1)))
        weights[place] = data.draw(st.sampled_from([float("nan"), -float("nan"), float("inf"), -float("inf")]))
        with pytest.raises(CheckpointError, match="got NaN or Inf in a\n"):
            check_finite({"a": weights}, Path("file"))


def test_weights_beyond_the_range_of_fp16_name_the_precision(micro: Any, tmp_path: Path) -> None:
    path, key, source = dit(tmp_path, micro)
    state = load_file(path)
    state[f"model.{key}"][0, 0] = 1e5
    save_file(state, path)
    assert source(path).load(torch.float32) is not None
    with pytest.raises(CheckpointError, match=f"in {key}\nhint: .*--precision fp32 or bf16"):
        source(path).load(torch.float16)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_without_advice_to_run_it(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"model": {"latent_in.weight": torch.zeros(1)}, "more": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        Weights(checkpoint=path).load(torch.float32)
    text = str(caught.value)
    assert f"{path} must be a checkpoint of plain tensors, got " in text and "\nhint: use the .safetensors file" in text
    assert not [advice for advice in ("weights_only", "still be loaded", "safe_globals") if advice in text]
    assert ("system" in text) is zipped
