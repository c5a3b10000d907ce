"""The cost of one velocity evaluation, counted from shapes: parameters, FLOP (plain and guided), attention's share."""

from __future__ import annotations

import dataclasses

import torch

from .config import DiTConfig, check_form
from .layers import EMBEDDING_DIM
from .model import Hunyuan3DDiT, null_token_bias


@dataclasses.dataclass(frozen=True)
class Flop:
    """Floating-point operations of matrix products. A multiply-add counts as 2."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention

    @property
    def attention_share(self) -> float:
        return self.attention / self.total


def parameters(config: DiTConfig) -> int:
    """The number of weights, biases and norm scales."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Hunyuan3DDiT(config).parameters())


def plain(config: DiTConfig, *, latent_tokens: int, context_tokens: int) -> Flop:
    """FLOP of one evaluation of one sample. Classifier-free guidance as two batch rows costs twice as much."""
    return _flop(config, latent_tokens, context_tokens, [(latent_tokens + context_tokens,) * 2])


def guided(config: DiTConfig, *, latent_tokens: int, context_tokens: int, form: str = "bias", null_tokens: int = 1) -> Flop:
    """FLOP of one guided evaluation: linear layers process the tokens of both branches, attention stays within each branch.

    form: bias, or repeat, in which attention sees the null token's key as often as the unconditional context has tokens.
    null_tokens: the tokens that replace the unconditional context: 1 in the form repeat; in the form bias as many as
    null_tokens() says.
    """
    queries = latent_tokens + null_tokens
    keys = latent_tokens + context_tokens if check_form(form) == "repeat" else queries
    attended = [(latent_tokens + context_tokens,) * 2, (queries, keys)]
    return _flop(config, 2 * latent_tokens, context_tokens + null_tokens, attended)


def null_tokens(form: str, dtype: torch.dtype) -> int:
    """The number of tokens that replace the unconditional context in a form of the guided graph. dtype: of its attention."""
    return 1 if check_form(form) == "repeat" else null_token_bias(2, dtype, torch.device("cpu")).shape[0]


def _flop(config: DiTConfig, latent_tokens: int, context_tokens: int, attended: list[tuple[int, int]]) -> Flop:
    """attended: for each attention, the numbers of its queries and keys."""
    width, mlp = config.hidden_size, config.mlp_hidden_size
    blocks = config.depth + config.depth_single_blocks
    # qkv, projection and both MLP layers. A single block computes the same products in two linear layers.
    per_token = blocks * (4 * width * width + 2 * width * mlp)
    embed_latents = 2 * config.in_channels * width  # latent_in and the final layer
    per_sample = width * width * (2 * 6 * config.depth + 3 * config.depth_single_blocks + 2)  # modulations
    embedders = 2 if config.guidance_embed else 1
    per_sample += embedders * (EMBEDDING_DIM * width + width * width)
    products = per_token * (latent_tokens + context_tokens) + embed_latents * latent_tokens
    products += config.context_in_dim * width * context_tokens + per_sample
    return Flop(2 * products, sum(2 * 2 * queries * keys * width * blocks for queries, keys in attended))
