"""The runtime `torch`: the denoiser's checkpoint itself, without an export (configs/torch.pbtxt). Knows nothing of Triton.

Needs the packages torch, einops and safetensors, and this project's hunyuan3d_export, which defines the network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack

from hunyuan3d_export.dit import load_checkpoint
from hunyuan3d_export.dit.config import GUIDED_FORMS

LIBRARY = torch
_DTYPES = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """device: a torch device, or auto, which takes a GPU when there is one. dtype: auto keeps the checkpoint's.

    attention_backend: sdpa, flash, chunked, standard, sage, or auto (sage where USE_SAGEATTN=1, else sdpa).
    guided_form: bias, or repeat, which needs no attention mask, or auto: repeat on CUDA, whose fused attention kernels take no
    mask, and else bias.
    compile: evaluate through torch.compile. cuda_graphs: record a graph for each shape, which pays where few shapes repeat.
    threads: how many compute one evaluation on a CPU, 0 for torch's own choice.
    """

    device: str
    dtype: str
    attention_backend: str
    guided_form: str
    compile: bool
    cuda_graphs: bool
    threads: int

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.guided_form not in ("auto", *GUIDED_FORMS):
            raise ValueError(f"guided_form must be one of auto, {', '.join(GUIDED_FORMS)}, got {self.guided_form!r}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        if self.cuda_graphs and self.torch_device().type != "cuda":
            raise ValueError(f"cuda_graphs must be false on {self.torch_device()}, got true\nhint: they need an NVIDIA GPU")

    def torch_device(self) -> torch.device:
        """Raises ValueError for a name that torch does not know and for a GPU that this machine lacks."""
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            device = torch.device(chosen)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device must be on this machine, got {self.device} of {torch.cuda.device_count()} GPUs")
        return device

    def form_on(self, device: torch.device) -> str:
        """The form of the guided evaluation on this device."""
        if self.guided_form != "auto":
            return self.guided_form
        return "repeat" if device.type == "cuda" else "bias"


def to_array(tensor: Any) -> torch.Tensor:
    """The torch tensor of a Triton tensor, by DLPack: without a copy, and on the same device."""
    return torch.from_dlpack(tensor.to_dlpack())


def to_tensor(tensor_class: Any, name: str, array: torch.Tensor) -> Any:
    """A Triton tensor of a torch tensor, by DLPack; tensor_class is pb_utils.Tensor, which takes contiguous ones only."""
    return tensor_class.from_dlpack(name, torch.utils.dlpack.to_dlpack(array.contiguous()))


class Network:
    """The denoiser of one checkpoint file, on its device; `outputs` are names for what a call of it returns.

    Raises FileNotFoundError when no checkpoint is deployed, ValueError for options that this machine or network cannot take.
    """

    fixed_sizes: Mapping[str, Mapping[int, int]] = {}  # unlike an exported graph, the network is not tied to any size

    def __init__(self, path: Path, options: Options, outputs: Sequence[str]) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --checkpoint FILE"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = options.torch_device()
        backend = None if options.attention_backend == "auto" else options.attention_backend
        self.model = load_checkpoint(path, dtype=_DTYPES[options.dtype], attention_backend=backend).to(self.device)
        self._outputs = list(outputs)
        self._graphs = options.cuda_graphs
        self.guided_form = options.form_on(self.device)
        guided = functools.partial(self.model.guided, form=self.guided_form)
        self._plain, self._guided = (_compiled(call, options) for call in (self.model.forward, guided))

    @torch.inference_mode()
    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One evaluation: inputs by name, on any device -> outputs by name, on the network's device, all of them [B, ...].

        The input guidance_scale asks for the guided evaluation; guidance is an input of guidance-distilled weights.
        """
        call = self._guided if "guidance_scale" in tensors else self._plain
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        returned = call(**{name: value.to(self.device, non_blocking=True) for name, value in tensors.items()})
        results = (returned,) if isinstance(returned, torch.Tensor) else returned
        # A recorded graph writes the results of all its evaluations to the same memory.
        kept = [result.clone() for result in results] if self._graphs else results
        return dict(zip(self._outputs, kept, strict=True))


def _compiled(call: Callable[..., torch.Tensor], options: Options) -> Callable[..., torch.Tensor]:
    if options.cuda_graphs:
        # A recorded graph has fixed addresses and shapes. With `compile` it holds generated kernels, otherwise torch's own.
        return torch.compile(
            call, dynamic=False, **({"mode": "reduce-overhead"} if options.compile else {"backend": "cudagraphs"})
        )
    return torch.compile(call, dynamic=True) if options.compile else call
