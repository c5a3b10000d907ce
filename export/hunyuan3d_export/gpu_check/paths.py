"""The ways to evaluate a velocity that are compared: plain, two-batch, and guided in each of its forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..dit import Hunyuan3DDiT, Preset, compute
from ..dit.network import amplification, example_inputs
from ..dit.reference_sampler import Denoiser
from ..precisions import PRECISIONS

GUIDANCE_SCALE = 5.0
GUIDED_FORMS = ("repeat", "bias")  # the form that plans have comes first


@dataclasses.dataclass(frozen=True)
class Path:
    """kind: plain, two-batch or guided. form: one of GUIDED_FORMS for the kind guided, "" for the others."""

    kind: str
    form: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.form})" if self.form else self.kind

    def call(self, denoiser: Denoiser) -> Callable[..., Tensor]:
        """The evaluation of `denoiser` that takes this path's inputs. A torch network is set to the path's form."""
        if self.kind != "guided":
            return denoiser
        if isinstance(denoiser, Hunyuan3DDiT):
            denoiser.arithmetic = dataclasses.replace(denoiser.arithmetic, guided_form=self.form)
        return denoiser.guided

    def inputs(self, preset: Preset, device: torch.device, *, batch: int = 1) -> dict[str, Tensor]:
        """Inputs for `batch` equal samples at the preset's own sizes. two-batch has a conditional and an unconditional row of each."""
        one = example_inputs((1, preset.num_latents, preset.context_tokens))
        inputs = {name: value.to(device).repeat_interleave(batch, dim=0) for name, value in one.items()}
        if self.kind == "two-batch":
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
            inputs["context"][batch:] = 0
        if self.kind == "guided":
            inputs["guidance_scale"] = torch.full((batch,), GUIDANCE_SCALE, device=device)
        return inputs

    def expected(self, two_batch: Tensor, *, batch: int = 1) -> Tensor:
        """The velocity that `inputs` must give. two_batch [2, L, C]: the velocities of one sample with and without its context."""
        conditional, unconditional = two_batch[:1], two_batch[1:]
        if self.kind == "two-batch":
            return two_batch.repeat_interleave(batch, dim=0)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        return (guided if self.kind == "guided" else conditional).repeat_interleave(batch, dim=0)

    def amplification(self, two_batch: Tensor) -> float:
        """How much larger this path's relative error is than that of the two velocities (see dit.network.amplification)."""
        return amplification(GUIDANCE_SCALE, two_batch[:1], two_batch[1:]) if self.kind == "guided" else 1.0

    def flop(self, preset: Preset, precision: str, *, batch: int = 1) -> int:
        """Floating-point operations of one evaluation of `batch` samples, at the preset's own sizes."""
        sizes: dict[str, Any] = {"latent_tokens": preset.num_latents, "context_tokens": preset.context_tokens}
        if self.kind == "guided":
            null_tokens = compute.null_tokens(self.form, PRECISIONS[precision])
            return batch * compute.guided(preset.config, **sizes, form=self.form, null_tokens=null_tokens).total
        return batch * compute.plain(preset.config, **sizes).total * (2 if self.kind == "two-batch" else 1)


PLAIN, TWO_BATCH = Path("plain"), Path("two-batch")
GUIDED = tuple(Path("guided", form) for form in GUIDED_FORMS)
# Those that tell the most come first.
PATHS = (TWO_BATCH, *GUIDED, PLAIN)


def with_batches(batches: tuple[int, ...]) -> Iterator[tuple[Path, int]]:
    """Every path with one sample; those that serve classifier-free guidance also with the other batch sizes."""
    yield from ((path, 1) for path in PATHS)
    yield from ((path, batch) for batch in batches if batch > 1 for path in PATHS if path is not PLAIN)
