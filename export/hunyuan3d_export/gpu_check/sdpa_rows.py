"""Each kernel behind torch's scaled_dot_product_attention at the presets' own sizes: the masked and the mask-free call.

The guided graph's form `bias` needs a mask; plain, two-batch and other forms do not. A kernel that refuses a call is a skipped row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dit import PRESETS
from .rows import Job, Row, Skip
from .setting import BATCHES, Setting
from .stopwatch import peak_mib

PART = "SDPA kernel"
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CPU_KERNELS = ("flash", "math")


class SdpaRows:
    """The jobs of all presets."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def jobs(self) -> Iterator[Job]:
        for preset in self._setting.presets:
            for batch, masked in [*((batch, False) for batch in BATCHES), (1, True)]:
                for kernel in _KERNELS:
                    yield Job(
                        PART,
                        self._name(preset, kernel, batch, masked),
                        functools.partial(self._measured, preset, kernel, batch, masked),
                    )

    def _name(self, preset: str, kernel: str, batch: int, masked: bool) -> str:
        tokens = PRESETS[preset].num_latents + PRESETS[preset].context_tokens
        return f"{kernel}, {preset} ({tokens} tokens), B {batch}{', with a mask' if masked else ''}"

    @torch.inference_mode()
    def _measured(self, preset: str, kernel: str, batch: int, masked: bool) -> Row:
        device, chosen = self._setting.device, PRESETS[preset]
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        tokens = chosen.num_latents + chosen.context_tokens
        shape = (batch, chosen.config.num_heads, tokens, chosen.config.head_dim)
        q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        # The mask of the form `bias`: one row of finite numbers for all queries.
        mask = torch.randn(tokens, device=device).to(dtype).expand(tokens, tokens) if masked else None
        if reason := _refusal(kernel, q, k, v, mask):
            raise Skip(reason)

        def run() -> Tensor:
            with sdpa_kernel(_KERNELS[kernel]):
                return F.scaled_dot_product_attention(q, k, v, mask)

        work = 2 * 2 * batch * tokens**2 * chosen.config.hidden_size
        return Row(
            part=PART,
            name=self._name(preset, kernel, batch, masked),
            time_ms=self._setting.stopwatch.median_ms(run),
            tflop=work / 1e12,
            roofline_ms=work / 1e9 / self._setting.stopwatch.matmul_tflops(dtype),
            memory_mib=peak_mib(run, device),
        )


def _refusal(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Why torch would not run this kernel; "" when it would."""
    if q.device.type != "cuda":
        return "" if kernel in _CPU_KERNELS else "this kernel exists on GPUs alone"
    parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, False)
    able = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "cuDNN": torch.backends.cuda.can_use_cudnn_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    return "" if kernel == "math" or able[kernel](parameters) else f"torch's {kernel} kernel refuses this call"
