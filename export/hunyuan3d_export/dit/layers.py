"""The parts of Hunyuan3DDiT. Attribute names are upstream's, because the keys of checkpoints are made of them.

Axes: B batch, L latent tokens, T context tokens, N all tokens, D width, H heads, d head size, M width inside an MLP,
C latent channels. img is the stream of latent tokens, txt that of context tokens, vec the embedding of t and guidance.
A comment at the right margin gives the shape of the line's result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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
    """Queries, keys and values, each [B, H, N, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Modulate(NamedTuple):
    """The parameters of one adaptive LayerNorm, each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


@dataclasses.dataclass(frozen=True)
class Branch:
    """A part of the joint sequence whose tokens attend to each other only: context_tokens, then latent_tokens.

    key_bias, [context_tokens + latent_tokens], is added to the attention scores of the branch's keys. repeats: attention sees
    the key and the value of the branch's only context token that many times; None, of any number of context tokens, once.
    """

    context_tokens: int
    latent_tokens: int
    key_bias: Tensor | None = None
    repeats: int | None = None

    @property
    def key_sizes(self) -> list[int]:
        """The pieces of the branch's keys in the joint sequence: one, or two where join_keys repeats the first."""
        if self.repeats is None:
            return [self.context_tokens + self.latent_tokens]
        return [self.context_tokens, self.latent_tokens]

    def join_keys(self, txt: Tensor, img: Tensor) -> Tensor:
        """The keys, or the values, that the branch attends to: [B, H, context_tokens, d], [B, H, latent_tokens, d]."""
        if self.repeats is not None:
            txt = txt.expand(-1, -1, self.repeats, -1)  #                                         [B, H, repeats, d]
        return torch.cat([txt, img], dim=-2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of the joint sequence: for each branch its context tokens, then its latent tokens.

    Blocks use a layout without knowing how many branches it has: their linear layers run over all tokens at once, and
    attention keeps the branches apart. attention_dtype: queries, keys and values are cast to it, and the result back.
    """

    branches: tuple[Branch, ...]
    attention_backend: str
    attention_dtype: torch.dtype

    @property
    def _context_sizes(self) -> list[int]:
        return [branch.context_tokens for branch in self.branches]

    @property
    def _latent_sizes(self) -> list[int]:
        return [branch.latent_tokens for branch in self.branches]

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """txt [..., sum of T, width] and img [..., sum of L, width] -> one sequence [..., N, width]."""
        pairs = zip(_cut(txt, self._context_sizes), _cut(img, self._latent_sizes), strict=True)
        return torch.cat([part for pair in pairs for part in pair], dim=-2)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of join: (txt, img)."""
        sizes = [size for branch in self.branches for size in (branch.context_tokens, branch.latent_tokens)]
        parts = _cut(sequence, sizes)
        return _cat(parts[0::2]), _cat(parts[1::2])

    def attend(self, heads: Heads) -> Tensor:
        """Attention of each branch within itself, over the joint sequence: [B, H, N, d] each -> [B, N, D]."""
        queries = _cut(heads.q, [branch.context_tokens + branch.latent_tokens for branch in self.branches])
        parts = zip(queries, self._keys(heads.k), self._keys(heads.v), strict=True)
        return _cat([self._attention(branch, Heads(*part)) for branch, part in zip(self.branches, parts, strict=True)])

    def attend_streams(self, txt: Heads, img: Heads) -> tuple[Tensor, Tensor]:
        """Attention of each branch within itself, over two streams: [B, H, T, d], [B, H, L, d] -> [B, T, D], [B, L, D].

        The tokens are ordered by branch only once, not joined to one sequence first.
        """
        outputs = []
        pairs = zip(_cut_heads(txt, self._context_sizes), _cut_heads(img, self._latent_sizes), strict=True)
        for branch, (context, latents) in zip(self.branches, pairs, strict=True):
            q = torch.cat([context.q, latents.q], dim=-2)  #                                      [B, H, N, d]
            heads = Heads(q, branch.join_keys(context.k, latents.k), branch.join_keys(context.v, latents.v))
            outputs.append(_cut(self._attention(branch, heads), [branch.context_tokens, branch.latent_tokens]))
        txt_outputs, img_outputs = zip(*outputs, strict=True)
        return _cat(txt_outputs), _cat(img_outputs)

    def _keys(self, sequence: Tensor) -> list[Tensor]:
        """The keys, or the values, of each branch, out of those of the joint sequence, [B, H, N, d]."""
        pieces = iter(_cut(sequence, [size for branch in self.branches for size in branch.key_sizes]))
        return [
            next(pieces) if branch.repeats is None else branch.join_keys(next(pieces), next(pieces)) for branch in self.branches
        ]

    def _attention(self, branch: Branch, heads: Heads) -> Tensor:
        dtype, bias = heads.q.dtype, branch.key_bias  #                                           [keys]
        q, k, v = (part.to(self.attention_dtype) for part in heads)  #                            [B, H, N, d] each
        if bias is not None:
            # ONNX Runtime's Attention does not broadcast a bias over the queries.
            bias = bias.expand(q.shape[-2], -1)  #                                                [N, keys]
        # Where the chosen backend takes no bias, a branch with a bias falls back to another backend. A branch without a
        # bias runs on the chosen backend, or raises that backend's error.
        out = attention(q, k, v, bias, backend=self.attention_backend, fall_back=bias is not None)
        return out.to(dtype)  #                                                                   [B, N, D]


def _cut_heads(heads: Heads, sizes: list[int]) -> list[Heads]:
    return [Heads(*parts) for parts in zip(*(_cut(part, sizes) for part in heads), strict=True)]


def _cut(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return (x,) if len(sizes) == 1 else torch.split(x, sizes, dim=-2)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-2)


def sinusoid_frequencies() -> Tensor:
    """The frequencies of the time embedding, 1000^(-k/128) for k = 0..127, [128]: float32, computed on the CPU.

    Graphs, other devices and half-precision models hold copies of these numbers. They must not compute their own, because
    another exp() may round the last bit differently, and a raw guidance of 5 multiplies that difference by 5000.
    """
    half = EMBEDDING_DIM // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(MAX_PERIOD) / half)
    return torch.exp(exponents)


def timestep_embedding(t: Tensor, frequencies: Tensor) -> Tensor:
    """The sinusoids of t, [B] -> [B, 256], cosines first, always float32.

    A half-precision model computes the angles in float32 too, because half precision loses most of its accuracy exactly
    here. A float64 model rounds them to float32, because the weights are trained on angles rounded so, and at 1000 t the
    rounding is visible in the velocity (3e-5).
    """
    scaled = TIME_FACTOR * t.to(torch.promote_types(t.dtype, torch.float32))  #                   [B]
    angles = scaled.to(torch.float32)[:, None] * frequencies  #                                   [B, 128]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  #                           [B, 256]


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)  #                                         [B, N, D]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The adaptive LayerNorm, in the dtype of the weights. x may be a float32 residual stream."""
    return ((1 + scale) * layer_norm(x) + shift).to(scale.dtype)  #                               [B, N, D]


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)  #                           [B, H, N, d]


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, qkv: Tensor, num_heads: int) -> Heads:
        """qkv [B, N, 3*D] -> q and k, normalised in each head, and v."""
        q, k, v = rearrange(qkv, "B N (K H d) -> K B H N d", K=3, H=num_heads)  #                 [B, H, N, d] each
        return Heads(self.query_norm(q), self.key_norm(k), v)


class MLPEmbedder(nn.Module):
    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(EMBEDDING_DIM, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)
        # A buffer, because it becomes a constant of exported graphs and moves to the GPU once, with the weights: a copy from
        # the host at each evaluation cannot be part of a CUDA graph. Not persistent, because upstream's files have no such key.
        self.register_buffer("frequencies", sinusoid_frequencies(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MLPEmbedder:
        """What .to(), .half() and their like do to weights and buffers, except that the frequencies are never rounded."""
        super()._apply(fn, recurse)
        self.frequencies = sinusoid_frequencies().to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, D] in the weights' dtype."""
        # load_state_dict(assign=True) may bring weights of another device; it does not move the buffer.
        frequencies = self.frequencies.to(t.device)  #                                            [128]
        embedding = timestep_embedding(t, frequencies).to(self.in_layer.weight.dtype)  #          [B, 256]
        return self.out_layer(F.silu(self.in_layer(embedding)))  #                                [B, D]


class Modulation(nn.Module):
    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, 3 * count * hidden_size)
        self.count = count

    def parts(self, values: Tensor) -> tuple[Modulate, ...]:
        """The product of `lin`, [B, 1, 3*count*D] -> `count` times (shift, scale, gate).

        The model evaluates `lin`, because all modulations have the same input and can be one product.
        """
        chunks = values.chunk(3 * self.count, dim=-1)  #                                          [B, 1, D] each
        return tuple(Modulate(*chunks[3 * i : 3 * i + 3]) for i in range(self.count))


class JoinedLinear(nn.Module):
    """Several linear layers of one input as one matrix product.

    Its tensors are buffers that no state dict contains. The weights of the layers become views of them, which saves memory.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer in layers]), persistent=False)
        self.register_buffer("bias", torch.cat([layer.bias.detach() for layer in layers]), persistent=False)
        for layer, weight in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, D] -> the product of each layer, [B, 1, its width]."""
        return F.linear(x, self.weight, self.bias)[:, None, :].split(self.sizes, dim=-1)


class JointAttention(nn.Module):
    """What one stream owns of the joint attention: the projections before and after it, and the norm of queries and keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor) -> Heads:
        return self.norm(self.qkv(x), self.num_heads)  #                                          [B, H, N, d] each


def _mlp(config: DiTConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_hidden_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_hidden_size, config.hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """The two streams with separate weights, in one joint attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, 2)
        self.img_attn = JointAttention(config)
        self.img_mlp = _mlp(config)
        self.txt_mod = Modulation(config.hidden_size, 2)
        self.txt_attn = JointAttention(config)
        self.txt_mlp = _mlp(config)

    def forward(
        self, img: Tensor, txt: Tensor, img_values: Tensor, txt_values: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """img [B, L, D], txt [B, T, D], the products of both modulations [B, 1, 6*D] -> img, txt of the same shapes."""
        img_attn_mod, img_mlp_mod = self.img_mod.parts(img_values)  #                             [B, 1, D] each
        txt_attn_mod, txt_mlp_mod = self.txt_mod.parts(txt_values)  #                             [B, 1, D] each
        img_heads = self.img_attn.heads(modulate(img, *img_attn_mod[:2]))  #                      [B, H, L, d] each
        txt_heads = self.txt_attn.heads(modulate(txt, *txt_attn_mod[:2]))  #                      [B, H, T, d] each
        txt_out, img_out = layout.attend_streams(txt_heads, img_heads)  #                         [B, T, D], [B, L, D]

        img = img + img_attn_mod.gate * self.img_attn.proj(img_out)  #                            [B, L, D]
        img = img + img_mlp_mod.gate * self.img_mlp(modulate(img, *img_mlp_mod[:2]))  #           [B, L, D]
        txt = txt + txt_attn_mod.gate * self.txt_attn.proj(txt_out)  #                            [B, T, D]
        txt = txt + txt_mlp_mod.gate * self.txt_mlp(modulate(txt, *txt_mlp_mod[:2]))  #           [B, T, D]
        return img, txt


class SingleStreamBlock(nn.Module):
    """All tokens in one sequence with one set of weights; attention and MLP run side by side."""

    attended_weight: Tensor | None
    hidden_weight: Tensor | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.widths = [3 * config.hidden_size, config.mlp_hidden_size]
        self.linear1 = nn.Linear(config.hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden_size, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, 1)
        # The two parts of linear2's weight, as tensors of their own; see Hunyuan3DDiT.prepare_for_graph.
        self.register_buffer("attended_weight", None, persistent=False)
        self.register_buffer("hidden_weight", None, persistent=False)

    def split_linear2(self) -> None:
        self.attended_weight, self.hidden_weight = (part.detach() for part in self._linear2_parts())

    def _linear2_parts(self) -> tuple[Tensor, Tensor]:
        if self.attended_weight is not None and self.hidden_weight is not None:
            return self.attended_weight, self.hidden_weight
        width = self.linear2.out_features
        return self.linear2.weight[:, :width], self.linear2.weight[:, width:]  #                  [D, D], [D, M]

    def forward(self, x: Tensor, values: Tensor, layout: Layout) -> Tensor:
        """x [B, N, D], the product of the modulation [B, 1, 3*D] -> [B, N, D]."""
        (mod,) = self.modulation.parts(values)  #                                                 [B, 1, D] each
        linear1 = self.linear1(modulate(x, mod.shift, mod.scale))  #                              [B, N, 3*D+M]
        qkv, mlp = torch.split(linear1, self.widths, dim=-1)  #                                   [B, N, 3*D], [B, N, M]
        attended = layout.attend(self.norm(qkv, self.num_heads))  #                               [B, N, D]
        hidden = F.gelu(mlp, approximate="tanh")  #                                               [B, N, M]
        # A sum of two products, so that no tensor of width D+M has to be put together first.
        attended_weight, hidden_weight = self._linear2_parts()  #                                 [D, D], [D, M]
        out = F.linear(attended, attended_weight)  #                                              [B, N, D]
        out = out + F.linear(hidden, hidden_weight, self.linear2.bias)  #                         [B, N, D]
        return x + mod.gate * out  #                                                              [B, N, D]


class LastLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    @property
    def modulation_layer(self) -> nn.Linear:
        layer = self.adaLN_modulation[1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """x [B, L, D], the product of the modulation [B, 1, 2*D] -> [B, L, C]."""
        shift, scale = values.chunk(2, dim=-1)  #                                                 [B, 1, D] each
        return self.linear(modulate(x, shift, scale))  #                                          [B, L, C]
