"""The denoiser in torch, from the checkpoint itself (configs/torch.pbtxt). Knows nothing of Triton.

Needs the packages torch, einops and safetensors and this project's hunyuan3d_export, which holds the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack

from hunyuan3d_export.dit import load_checkpoint
from hunyuan3d_export.dit.layers import make_compilable

LIBRARY = torch
_DTYPES = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """device: a torch device, or auto (a GPU when there is one). dtype: auto keeps the checkpoint's.

    attention_backend: sdpa, flash, chunked, standard, sage, or auto (sage where USE_SAGEATTN=1, else sdpa).
    compile: through torch.compile. cuda_graphs: one recorded graph for each shape, for few sizes that come again and again.
    threads: of one evaluation on a CPU, 0 for torch's own choice.
    """

    device: str
    dtype: str
    attention_backend: str
    compile: bool
    cuda_graphs: bool
    threads: int

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        if self.cuda_graphs and self.torch_device().type != "cuda":
            raise ValueError(f"cuda_graphs must be false on {self.torch_device()}, got true\nhint: they need an NVIDIA GPU")

    def torch_device(self) -> torch.device:
        """Raises ValueError for a name torch does not know or a GPU that is not there."""
        here = torch.cuda.is_available()
        try:
            device = torch.device("cuda" if here else "cpu") if self.device == "auto" else torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device must be on this machine, got {self.device} of {torch.cuda.device_count()} GPUs")
        return device


def to_array(tensor: Any) -> torch.Tensor:
    """A tensor of Triton's as torch's, by DLPack: one that is on a GPU stays there."""
    return torch.from_dlpack(tensor.to_dlpack())


def to_tensor(kind: Any, name: str, array: torch.Tensor) -> Any:
    """The other way; `kind` is Triton's class."""
    return kind.from_dlpack(name, torch.utils.dlpack.to_dlpack(array))


class Denoiser:
    """The network of one checkpoint file, on its device.

    Raises FileNotFoundError when no checkpoint is deployed, ValueError for options that this machine or network cannot take.
    """

    def __init__(self, path: Path, options: Options) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --checkpoint FILE"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = options.torch_device()
        backend = None if options.attention_backend == "auto" else options.attention_backend
        self.model = load_checkpoint(path, dtype=_DTYPES[options.dtype], attention_backend=backend).to(self.device)
        self._graphs = options.cuda_graphs
        self._plain, self._guided = (_compiled(call, options) for call in (self.model.forward, self.model.guided))

    @torch.inference_mode()
    def evaluate(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """latents [B, L, 64], t [B], context [B, T, 1536] and a scale [B], if any, on any device -> velocity [B, L, 64].

        guidance_scale asks for the guided evaluation; guidance is what guidance-distilled weights take.
        """
        call = self._guided if "guidance_scale" in tensors else self._plain
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        velocity = call(**{name: value.to(self.device, non_blocking=True) for name, value in tensors.items()})
        # A recorded graph writes every result to the same place.
        return velocity.clone() if self._graphs else velocity


def _compiled(call: Callable[..., torch.Tensor], options: Options) -> Callable[..., torch.Tensor]:
    if options.compile or options.cuda_graphs:
        make_compilable()
    if options.cuda_graphs:
        # Graphs are recorded for fixed addresses and shapes; with compile, around generated kernels instead of torch's own.
        return torch.compile(
            call, dynamic=False, **({"mode": "reduce-overhead"} if options.compile else {"backend": "cudagraphs"})
        )
    return torch.compile(call, dynamic=True) if options.compile else call
