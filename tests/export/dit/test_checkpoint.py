"""Checkpoint files as upstream writes them, and as they go wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan3d_export.dit import CheckpointError, DiTConfig, load_checkpoint, random_model, save_checkpoint
from hunyuan3d_export.dit.checkpoint import derive_config

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".ckpt")


def write_parts(path: Path, parts: Mapping[str, State]) -> Path:
    """A file as upstream's training code leaves it: several parts side by side."""
    if path.suffix == ".ckpt":
        torch.save(dict(parts), path)
    else:
        save_file({f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}, path)
    return path


def neighbours() -> dict[str, State]:
    """The parts beside the DiT in a pipeline's file. Some of their keys end like keys of the DiT."""
    return {
        "vae": {"post_kl.weight": torch.ones(3, 2), "cond_in.weight": torch.ones(2, 2)},
        "conditioner": {"main_image_encoder.model.layer.0.weight": torch.ones(4), "latent_in.weight": torch.ones(1, 1)},
    }


def state_of(config: DiTConfig, dtype: torch.dtype = torch.float16) -> State:
    return dict(random_model(config, seed=5, dtype=dtype).state_dict())


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(narrow: DiTConfig, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model = random_model(narrow, seed=5, dtype=dtype)
    save_checkpoint(model, tmp_path / f"model{suffix}", dtype=None)
    loaded = load_checkpoint(tmp_path / f"model{suffix}")
    assert loaded.config == narrow and loaded.dtype == dtype and not loaded.training
    assert_equal(loaded.state_dict(), model.state_dict())
    # A loaded model's tensors are views of one mapped file; writing them again must still work.
    save_checkpoint(loaded, tmp_path / f"again{suffix}", dtype=None)
    assert_equal(load_checkpoint(tmp_path / f"again{suffix}").state_dict(), model.state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("guidance_embed", [False, True])
@pytest.mark.parametrize("depths", [(16, 32), (8, 16)])
def test_upstream_files_load_by_their_path_alone(
    narrow: DiTConfig, tmp_path: Path, depths: tuple[int, int], guidance_embed: bool, suffix: str
) -> None:
    config = dataclasses.replace(narrow, depth=depths[0], depth_single_blocks=depths[1], guidance_embed=guidance_embed)
    state = state_of(config)
    loaded = load_checkpoint(write_parts(tmp_path / f"model.fp16{suffix}", {**neighbours(), "model": state}))
    assert loaded.config == config
    assert_equal(loaded.state_dict(), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bare_keys(narrow: DiTConfig, tmp_path: Path, suffix: str) -> None:
    state, path = state_of(narrow), tmp_path / f"bare{suffix}"
    torch.save(state, path) if suffix == ".ckpt" else save_file(state, path)
    assert_equal(load_checkpoint(path).state_dict(), state)


def test_saved_file_is_upstreams_format(narrow: DiTConfig, tmp_path: Path) -> None:
    model = random_model(narrow, seed=5)
    save_checkpoint(model, tmp_path / "model.safetensors")
    save_checkpoint(model, tmp_path / "model.ckpt")
    half = {f"model.{key}": value.half() for key, value in model.state_dict().items()}
    assert_equal(dict(sorted(load_file(tmp_path / "model.safetensors").items())), dict(sorted(half.items())))
    parts = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert list(parts) == ["model"]
    assert_equal({f"model.{key}": value for key, value in parts["model"].items()}, half)


def test_dtype_converts_and_none_keeps_the_files(narrow: DiTConfig, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "model.safetensors", {"model": state_of(narrow)})
    assert load_checkpoint(path).dtype == torch.float16
    converted = load_checkpoint(path, dtype=torch.float32).state_dict()
    assert_equal(converted, {key: value.float() for key, value in state_of(narrow).items()})


def test_weights_need_no_gradient(narrow: DiTConfig, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "model.safetensors", {"model": state_of(narrow)})
    assert not any(parameter.requires_grad for parameter in load_checkpoint(path).parameters())


def test_old_pickle_format(narrow: DiTConfig, tmp_path: Path) -> None:
    path, state = tmp_path / "old.ckpt", state_of(narrow)
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    assert_equal(load_checkpoint(path).state_dict(), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_wrong_name_does_not_matter(narrow: DiTConfig, tmp_path: Path, suffix: str) -> None:
    state = state_of(narrow)
    path = write_parts(tmp_path / f"model{suffix}", {"model": state, **neighbours()})
    wrong = path.rename(tmp_path / f"renamed{SUFFIXES[1 - SUFFIXES.index(suffix)]}")
    assert_equal(load_checkpoint(wrong).state_dict(), state)


def test_header_length_that_looks_like_a_pickle(narrow: DiTConfig, tmp_path: Path) -> None:
    state = state_of(narrow)
    path = write_parts(tmp_path / "model.safetensors", {"model": state})
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    padded = size + (0x0280 - size) % 0x10000  # the file then begins with 80 02, like a pickle
    path.write_bytes(struct.pack("<Q", padded) + data[8 : 8 + size] + b" " * (padded - size) + data[8 + size :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert_equal(load_checkpoint(path).state_dict(), state)


MEASURE = """
import json, sys
from hunyuan3d_export.dit import DiTConfig, load_checkpoint

def private_mib():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Anonymous"))) / 2048

def peak_mib():  # not ru_maxrss, which a child inherits from the process that forks it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

before, peak = private_mib(), peak_mib()
model = load_checkpoint(sys.argv[1])
loaded = private_mib()
total = float(sum(parameter.double().sum() for parameter in model.parameters()))
after = peak_mib()
print(json.dumps({"private": loaded - before, "peak": after - peak, "total": total}))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory by kind is read from Linux's /proc")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_stay_mapped(tiny: DiTConfig, tmp_path: Path, suffix: str) -> None:
    config = dataclasses.replace(tiny, hidden_size=1024, num_heads=16, depth=2, depth_single_blocks=4)
    path = tmp_path / f"model{suffix}"
    save_checkpoint(random_model(config, dtype=torch.float16), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the kernel counts mapped pages that are not on disk yet as the process's own
    size_mib = path.stat().st_size / 2**20
    assert size_mib > 180
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    # Loading copies nothing, because the weights are the file's mapped pages: reading all of them takes the file's size once.
    assert found["private"] < 0.15 * size_mib, found
    assert found["peak"] < 1.4 * size_mib, found
    assert found["total"] != 0


@given(hidden=st.integers(1, 300), mlp=st.integers(1, 1200))
def test_derived_ratio_gives_the_width_back(hidden: int, mlp: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "latent_in.weight": (hidden, 3),
        "cond_in.weight": (hidden, 5),
        "double_blocks.0.img_attn.norm.query_norm.scale": (hidden,),
        "double_blocks.0.img_mlp.0.weight": (mlp, hidden),
        "single_blocks.0.linear2.bias": (hidden,),
    }
    assert derive_config(shapes, Path("file")).mlp_hidden_size == mlp


class TestRefusals:
    """Every message names the file; none leaves a Python traceback of another library as the only explanation."""

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="found nothing at .*none.safetensors"):
            load_checkpoint(tmp_path / "none.safetensors")
        with pytest.raises(FileNotFoundError, match="found a folder at"):
            load_checkpoint(tmp_path)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_file(self, narrow: DiTConfig, tmp_path: Path, suffix: str, fraction: float) -> None:
        path = write_parts(tmp_path / f"model{suffix}", {"model": state_of(narrow)})
        os.truncate(path, int(path.stat().st_size * fraction))
        with pytest.raises(CheckpointError, match=f"model{suffix} must be a whole"):
            load_checkpoint(path)

    def test_truncated_old_pickle(self, narrow: DiTConfig, tmp_path: Path) -> None:
        path = tmp_path / "old.ckpt"
        torch.save({"model": state_of(narrow)}, path, _use_new_zipfile_serialization=False)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="old.ckpt must be a whole"):
            load_checkpoint(path)

    @pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"PK\x03\x04x"])
    def test_not_a_checkpoint_at_all(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors must be a whole"):
            load_checkpoint(path)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_vae_only(self, tmp_path: Path, suffix: str) -> None:
        path = write_parts(tmp_path / f"vae{suffix}", neighbours())
        with pytest.raises(CheckpointError, match="must hold a DiT .*found the parts conditioner, vae\nhint: pass the model"):
            load_checkpoint(path)

    def test_bare_vae(self, tmp_path: Path) -> None:
        save_file(neighbours()["vae"], tmp_path / "vae.safetensors")
        with pytest.raises(CheckpointError, match="found the parts cond_in, post_kl"):
            load_checkpoint(tmp_path / "vae.safetensors")

    def test_missing_keys_are_named(self, narrow: DiTConfig, tmp_path: Path) -> None:
        state = state_of(narrow)
        del state["final_layer.linear.bias"], state["double_blocks.1.img_mlp.2.weight"]
        path = write_parts(tmp_path / "model.safetensors", {"model": state})
        with pytest.raises(
            CheckpointError, match="missing double_blocks.1.img_mlp.2.weight\n  missing final_layer.linear.bias$"
        ):
            load_checkpoint(path)

    @pytest.mark.parametrize("key", ["cond_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"])
    def test_missing_key_of_the_config(self, narrow: DiTConfig, tmp_path: Path, key: str) -> None:
        state = state_of(narrow)
        del state[key]
        with pytest.raises(CheckpointError, match=f"must hold all keys of a Hunyuan3DDiT, missing {key}"):
            load_checkpoint(write_parts(tmp_path / "model.safetensors", {"model": state}))

    def test_missing_middle_block(self, narrow: DiTConfig, tmp_path: Path) -> None:
        state = {key: value for key, value in state_of(narrow).items() if not key.startswith("single_blocks.1.")}
        path = write_parts(tmp_path / "model.safetensors", {"model": state})
        with pytest.raises(CheckpointError, match="missing single_blocks.1.linear1.weight"):
            load_checkpoint(path)

    def test_at_most_ten_keys_are_named(self, narrow: DiTConfig, tmp_path: Path) -> None:
        state = state_of(narrow) | {f"extra.{i}": torch.ones(1, dtype=torch.float16) for i in range(13)}
        path = write_parts(tmp_path / "model.safetensors", {"model": state})
        with pytest.raises(CheckpointError, match="unexpected extra") as caught:
            load_checkpoint(path)
        assert str(caught.value).count("unexpected") == 10 and "... and 3 more" in str(caught.value)

    def test_partial_guidance_embedding(self, distilled: DiTConfig, tmp_path: Path) -> None:
        state = state_of(distilled)
        del state["guidance_in.in_layer.bias"]
        with pytest.raises(CheckpointError, match="missing guidance_in.in_layer.bias"):
            load_checkpoint(write_parts(tmp_path / "model.safetensors", {"model": state}))

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            ("single_blocks.1.linear1.weight", (3, 40), r"single_blocks.1.linear1.weight must be \[240, 40\], got \[3, 40\]"),
            ("latent_in.weight", (44, 6), r"must be .*, got"),
            ("latent_in.weight", (40,), "must have the shapes of a Hunyuan3DDiT"),
            ("cond_in.weight", (40,), "must have the shapes of a Hunyuan3DDiT"),
            ("double_blocks.0.img_attn.norm.query_norm.scale", (0,), "must have the shapes of a Hunyuan3DDiT"),
            ("double_blocks.0.img_attn.norm.query_norm.scale", (7,), "hidden_size|must be .*, got"),
        ],
    )
    def test_wrong_widths(self, narrow: DiTConfig, tmp_path: Path, key: str, shape: tuple[int, ...], message: str) -> None:
        state = state_of(narrow) | {key: torch.ones(shape, dtype=torch.float16)}
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(write_parts(tmp_path / "model.safetensors", {"model": state}))

    @pytest.mark.parametrize("key", ["single_blocks.4000000000.x", "double_blocks.first.x"])
    def test_stray_block_number(self, narrow: DiTConfig, tmp_path: Path, key: str) -> None:
        state = state_of(narrow) | {key: torch.ones(1, dtype=torch.float16)}
        with pytest.raises(CheckpointError, match="must have the shapes of a Hunyuan3DDiT"):
            load_checkpoint(write_parts(tmp_path / "model.safetensors", {"model": state}))

    def test_mixed_types(self, narrow: DiTConfig, tmp_path: Path) -> None:
        state = state_of(narrow)
        state["cond_in.bias"] = state["cond_in.bias"].float()
        path = write_parts(tmp_path / "model.safetensors", {"model": state})
        with pytest.raises(CheckpointError, match="one floating-point type, got float16, float32\nhint: pass dtype="):
            load_checkpoint(path)
        assert load_checkpoint(path, dtype=torch.float32).dtype == torch.float32

    @pytest.mark.parametrize("new_format", [True, False])
    def test_code_in_a_pickle_is_never_run(self, narrow: DiTConfig, tmp_path: Path, new_format: bool) -> None:
        path, trace = tmp_path / "model.ckpt", tmp_path / "trace"
        torch.save({"model": state_of(narrow), "evil": Touch(trace)}, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(CheckpointError, match="must be a checkpoint of plain tensors"):
            load_checkpoint(path)
        assert not trace.exists()

    def test_code_in_a_bare_pickle_is_never_run(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "model.safetensors", tmp_path / "trace"
        path.write_bytes(pickle.dumps(Touch(trace), protocol=2))
        with pytest.raises(CheckpointError, match="must be a checkpoint of plain tensors"):
            load_checkpoint(path)
        assert not trace.exists()

    def test_pickle_of_something_else(self, tmp_path: Path) -> None:
        torch.save(torch.ones(3), tmp_path / "tensor.ckpt")
        with pytest.raises(CheckpointError, match="must hold a dict, got Tensor"):
            load_checkpoint(tmp_path / "tensor.ckpt")
        torch.save({"step": 3}, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match="found the parts none"):
            load_checkpoint(tmp_path / "other.ckpt")


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.open, (str(self.path), os.O_CREAT)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_save_leaves_nothing(
    narrow: DiTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, error: type[BaseException]
) -> None:
    def half_written(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    monkeypatch.setattr("torch.save", half_written)
    with pytest.raises(error):
        save_checkpoint(random_model(narrow), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_failed_save_keeps_the_old_file(narrow: DiTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "model.safetensors", random_model(narrow)
    save_checkpoint(model, path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(random_model(narrow, seed=6), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_save_refuses_another_suffix(narrow: DiTConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .safetensors or .ckpt, got model.bin"):
        save_checkpoint(random_model(narrow), tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


def test_random_model_is_random_everywhere_and_seeded(distilled: DiTConfig) -> None:
    one, same, other = (random_model(distilled, seed=seed).state_dict() for seed in (1, 1, 2))
    for key, value in one.items():
        assert torch.equal(value, same[key]) and not torch.equal(value, other[key]), key
        assert value.count_nonzero() == value.numel() and value.unique().numel() > 1, key
