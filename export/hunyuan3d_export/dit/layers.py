"""The parts of Hunyuan3DDiT. Attribute names are upstream's, because checkpoint keys are made of them.

Axes: B batch, L latent tokens, T context tokens, N = all tokens, D width, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import attention
from .config import MAX_PERIOD, TIME_FACTOR, DiTConfig

NORM_EPS = 1e-6
EMBEDDING_DIM = 256


class Heads(NamedTuple):
    """Queries, keys and values, each [B, H, N, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Modulate(NamedTuple):
    """One adaptive LayerNorm's parameters, each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


@dataclasses.dataclass(frozen=True)
class Branch:
    """One stretch of the sequence that attends within itself: context_tokens, then latent_tokens.

    key_bias, [context_tokens + latent_tokens], is added to the attention scores of its keys.
    """

    context_tokens: int
    latent_tokens: int
    key_bias: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the two streams lie in the joint sequence: each branch's context tokens, then its latent tokens.

    Blocks know nothing of branches beyond this: linear layers run over all tokens at once, attention within each branch.
    """

    branches: tuple[Branch, ...]
    attention_backend: str

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """The two streams [..., sum of T, C] and [..., sum of L, C] as one sequence [..., N, C]."""
        txt_parts = _cut(txt, [branch.context_tokens for branch in self.branches])
        img_parts = _cut(img, [branch.latent_tokens for branch in self.branches])
        return torch.cat([part for pair in zip(txt_parts, img_parts, strict=True) for part in pair], dim=-2)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of join: (txt, img)."""
        sizes = [size for branch in self.branches for size in (branch.context_tokens, branch.latent_tokens)]
        parts = _cut(sequence, sizes)
        return _cat(parts[0::2]), _cat(parts[1::2])

    def attend(self, heads: Heads) -> Tensor:
        """Attention of each branch within itself: [B, H, N, head_dim] each -> [B, N, D]."""
        sizes = [branch.context_tokens + branch.latent_tokens for branch in self.branches]
        per_branch = zip(self.branches, *(_cut(part, sizes) for part in heads), strict=True)
        outputs = []
        for branch, q, k, v in per_branch:
            # ONNX Runtime's Attention does not broadcast a mask over the queries, so it is spelled out: [N, N].
            bias = None if branch.key_bias is None else branch.key_bias.expand(q.shape[-2], -1)
            # Not every kernel takes a bias; without one, what the caller chose is what runs, or an error.
            outputs.append(attention(q, k, v, bias, backend=self.attention_backend, fall_back=bias is not None))
        return _cat(outputs)


def _cut(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return (x,) if len(sizes) == 1 else torch.split(x, sizes, dim=-2)


def _cat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-2)


@functools.cache
def _frequencies(max_period: float) -> tuple[float, ...]:
    """The sinusoids' frequencies, [128], as float32 numbers.

    Constants, so that a graph holds the very ones torch uses: another exp() may round the last bit otherwise, which a raw
    guidance of 5 multiplies by 5000.
    """
    half = EMBEDDING_DIM // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(max_period) / half)
    return tuple(torch.exp(exponents).tolist())


def _frequency_tensor(device: torch.device, max_period: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_frequencies(max_period), dtype=torch.float32, device=device)


_kept_frequency_tensor = functools.cache(_frequency_tensor)


def _constant_frequencies(device: torch.device) -> Tensor:
    """Kept, [128]: made anew they would be a copy to the GPU in every evaluation, which no CUDA graph can hold."""
    return _kept_frequency_tensor(device, MAX_PERIOD)


def make_compilable() -> None:
    """Call before torch.compile: an evaluation then becomes one graph. Not done at import, where it costs a second."""
    torch.compiler.assume_constant_result(_constant_frequencies)


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoids of t, [B] -> [B, 256], cosines first, always float32.

    Half precision loses most of its accuracy exactly here, so the angles never see it. A float64 t gains nothing either:
    the weights are trained on angles rounded to float32, and at 1000 t that rounding is visible in the velocity (3e-5).
    """
    # The exporter's tensors are fake ones, which must not be kept.
    exporting = torch.compiler.is_exporting()
    frequencies = _frequency_tensor(t.device, MAX_PERIOD) if exporting else _constant_frequencies(t.device)
    scaled = TIME_FACTOR * t.to(torch.promote_types(t.dtype, torch.float32))
    angles = scaled.to(torch.float32)[:, None] * frequencies  # [B, 128]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, mod: Modulate) -> Tensor:
    return (1 + mod.scale) * layer_norm(x) + mod.shift


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, qkv: Tensor, num_heads: int) -> Heads:
        """[B, N, 3*D] -> q, k (normalised per head) and v."""
        q, k, v = rearrange(qkv, "B N (K H D) -> K B H N D", K=3, H=num_heads)
        return Heads(self.query_norm(q), self.key_norm(k), v)


class MLPEmbedder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        _frequencies(MAX_PERIOD)  # before any tracing, which could not take constants from tensors
        self.in_layer = nn.Linear(EMBEDDING_DIM, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, D] in the weights' dtype."""
        embedding = timestep_embedding(t).to(self.in_layer.weight.dtype)
        return self.out_layer(F.silu(self.in_layer(embedding)))


class Modulation(nn.Module):
    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, 3 * count * hidden_size)
        self.count = count

    def forward(self, vec: Tensor) -> tuple[Modulate, ...]:
        """vec [B, D] -> `count` times (shift, scale, gate)."""
        chunks = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.count, dim=-1)
        return tuple(Modulate(*chunks[3 * i : 3 * i + 3]) for i in range(self.count))


class JointAttention(nn.Module):
    """One stream's share of the joint attention: its qkv, its QK norm, its projection."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor) -> Heads:
        return self.norm(self.qkv(x), self.num_heads)


def _mlp(config: DiTConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_hidden_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_hidden_size, config.hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """Latents and context with weights of their own, attending jointly."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, 2)
        self.img_attn = JointAttention(config)
        self.img_mlp = _mlp(config)
        self.txt_mod = Modulation(config.hidden_size, 2)
        self.txt_attn = JointAttention(config)
        self.txt_mlp = _mlp(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """img [B, L, D], txt [B, T, D], vec [B, D] -> img, txt of the same shapes."""
        img_attn_mod, img_mlp_mod = self.img_mod(vec)
        txt_attn_mod, txt_mlp_mod = self.txt_mod(vec)
        img_heads = self.img_attn.heads(modulate(img, img_attn_mod))  # [B, H, L, head_dim] each
        txt_heads = self.txt_attn.heads(modulate(txt, txt_attn_mod))  # [B, H, T, head_dim] each
        joint = Heads(*(layout.join(t, i) for t, i in zip(txt_heads, img_heads, strict=True)))  # [B, H, N, head_dim]
        txt_out, img_out = layout.split(layout.attend(joint))  # [B, T, D], [B, L, D]

        img = img + img_attn_mod.gate * self.img_attn.proj(img_out)  # [B, L, D]
        img = img + img_mlp_mod.gate * self.img_mlp(modulate(img, img_mlp_mod))
        txt = txt + txt_attn_mod.gate * self.txt_attn.proj(txt_out)  # [B, T, D]
        txt = txt + txt_mlp_mod.gate * self.txt_mlp(modulate(txt, txt_mlp_mod))
        return img, txt


class SingleStreamBlock(nn.Module):
    """All tokens with one set of weights; attention and MLP side by side."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.widths = [3 * config.hidden_size, config.mlp_hidden_size]
        self.linear1 = nn.Linear(config.hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden_size, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, 1)

    def forward(self, x: Tensor, vec: Tensor, layout: Layout) -> Tensor:
        """x [B, N, D], vec [B, D] -> [B, N, D]."""
        (mod,) = self.modulation(vec)
        qkv, mlp = torch.split(self.linear1(modulate(x, mod)), self.widths, dim=-1)  # [B, N, 3*D], [B, N, 4*D]
        attended = layout.attend(self.norm(qkv, self.num_heads))  # [B, N, D]
        hidden = torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)  # [B, N, 5*D]
        return x + mod.gate * self.linear2(hidden)


class LastLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x [B, L, D], vec [B, D] -> [B, L, C]."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear((1 + scale) * layer_norm(x) + shift)
