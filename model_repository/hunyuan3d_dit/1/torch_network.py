"""The runtime `torch`: a network's checkpoint itself, without an export (configs/torch.pbtxt). Knows nothing of Triton.

Needs the packages torch, einops and safetensors, and this project's hunyuan3d_export, which defines the networks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack

LIBRARY = torch
_DTYPES = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """network: the folder of hunyuan3d_export that defines the network. graph: the name of the network's graph to evaluate.

    device: a torch device, or auto, which takes a GPU when there is one. dtype: auto keeps the checkpoint's.
    attention_backend: sdpa, flash, chunked, standard, sage, or auto (sage where USE_SAGEATTN=1, else sdpa).
    compile: evaluate through torch.compile. cuda_graphs: record a graph for each shape, which pays where few shapes repeat.
    threads: how many compute one evaluation on a CPU, 0 for torch's own choice there and one on a GPU. choices: the network's own
    options, each NAME=VALUE, with spaces between them.
    """

    network: str
    graph: str
    device: str
    dtype: str
    attention_backend: str
    compile: bool
    cuda_graphs: bool
    threads: int
    choices: str

    def __post_init__(self) -> None:
        if not self.network.isidentifier():
            raise ValueError(f"network must be a folder of hunyuan3d_export, got {self.network!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
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


def to_array(tensor: Any) -> torch.Tensor:
    """The torch tensor of a Triton tensor, by DLPack: without a copy, and on the same device."""
    return torch.from_dlpack(tensor.to_dlpack())


def to_tensor(tensor_class: Any, name: str, array: torch.Tensor) -> Any:
    """A Triton tensor of a torch tensor, by DLPack; tensor_class is pb_utils.Tensor, which takes contiguous ones only."""
    return tensor_class.from_dlpack(name, torch.utils.dlpack.to_dlpack(array.contiguous()))


class Network:
    """One graph of a network, with the weights of a checkpoint file, on its device; `outputs` are names for what it returns.

    Raises FileNotFoundError when no checkpoint is deployed, ValueError for options that this machine or network cannot take.
    """

    fixed_sizes: Mapping[str, Mapping[int, int]] = {}  # unlike an exported graph, the network is not tied to any size

    def __init__(self, path: Path, options: Options, outputs: Sequence[str]) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --checkpoint FILE"
            )
        self.device = options.torch_device()
        # On a GPU only loading runs on the CPU, and the models of a server load at once: their threads would hold each other up.
        if threads := options.threads or (1 if self.device.type == "cuda" else 0):
            torch.set_num_threads(threads)
        backend = None if options.attention_backend == "auto" else options.attention_backend
        defined = importlib.import_module(f"hunyuan3d_export.{options.network}.served")
        choices = dict(choice.partition("=")[::2] for choice in options.choices.split())
        load = functools.partial(defined.load, dtype=_DTYPES[options.dtype], attention_backend=backend)
        self.module: torch.nn.Module = load(path, options.graph, choices=choices, device=self.device).to(self.device)
        self._outputs = list(outputs)
        self._graphs = options.cuda_graphs
        self._call = _compiled(self.module.forward, options)

    @torch.inference_mode()
    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One evaluation: inputs by name, on any device -> outputs by name, on the network's device, all of them [B, ...]."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        returned = self._call(**{name: value.to(self.device, non_blocking=True) for name, value in tensors.items()})
        results = (returned,) if isinstance(returned, torch.Tensor) else returned
        # A recorded graph writes the results of all its evaluations to the same memory.
        kept = [result.clone() for result in results] if self._graphs else results
        return dict(zip(self._outputs, kept, strict=True))


def _compiled(call: Callable[..., Any], options: Options) -> Callable[..., Any]:
    if options.cuda_graphs:
        # A recorded graph has fixed addresses and shapes. With `compile` it holds generated kernels, otherwise torch's own.
        return torch.compile(
            call, dynamic=False, **({"mode": "reduce-overhead"} if options.compile else {"backend": "cudagraphs"})
        )
    return torch.compile(call, dynamic=True) if options.compile else call
