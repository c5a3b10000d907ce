"""Hunyuan3DDiT: the wiring of the parts in layers.py, where the axes are named too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import resolve_backend
from .config import Arithmetic, DiTConfig, check_form
from .layers import Branch, DoubleStreamBlock, JoinedLinear, LastLayer, Layout, MLPEmbedder, Modulation, SingleStreamBlock

# In half precision the bias ln(T) is rounded, so that one null token would weigh up to 0.4 % (fp16) or 3 % (bf16) too much or
# too little. Therefore several copies of the token share the weight T. Each number here stands for one copy, which takes all of
# the weight that is still to be shared except this fraction; the last copy takes the rest. The fraction is about as large as
# the error of rounding (fp16 keeps ln T to 2^-8, bf16 to 2^-5), so that later copies can make up for it. The exponentials of the
# rounded biases sum to T within 7e-6 (fp16) or 1.3e-5 (bf16) up to T = 5480.
_NULL_REMAINDERS = {torch.float16: (2.0**-8,), torch.bfloat16: (2.0**-5, 2.0**-6)}


def null_token_bias(context_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The attention biases b of the copies that replace T = `context_tokens` equal tokens, [copies] in dtype: sum(exp(b)) = T.

    T equal keys with equal values weigh T exp(score) = exp(score + ln T): one key with the bias ln T replaces them exactly.
    """
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    rest = torch.full((), context_tokens, dtype=at_least_float32, device=device)  #               []
    biases = []
    for remainder in _NULL_REMAINDERS.get(dtype, ()):
        biases.append(torch.log(rest * (1 - remainder)).to(dtype))
        rest = rest - torch.exp(biases[-1].to(at_least_float32))  #                               []
    biases.append(torch.log(rest).to(dtype))
    return torch.stack(biases)  #                                                                 [copies]


class Hunyuan3DDiT(nn.Module):
    """The velocity field of Hunyuan3D-2's shape latents.

    State-dict keys are upstream's. The arithmetic runs in the dtype of the weights. Inputs may have another dtype, and the
    velocity has that of the latents, so that a sampler can integrate in float32 around a half-precision model. The attribute
    `arithmetic` may be replaced at any time.
    """

    def __init__(self, config: DiTConfig, *, attention_backend: str | None = None) -> None:
        """attention_backend None: `sage` where USE_SAGEATTN=1, else `sdpa`.

        Raises ValueError for an unknown backend and ImportError for `sage` without its package.
        """
        super().__init__()
        self.config = config
        self.attention_backend = resolve_backend(attention_backend)
        self.arithmetic = Arithmetic()
        self.latent_in = nn.Linear(config.in_channels, config.hidden_size)
        self.time_in = MLPEmbedder(config.hidden_size)
        self.cond_in = nn.Linear(config.context_in_dim, config.hidden_size)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(config.hidden_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(config)
        # In the order in which _velocity uses their products: that of the blocks, and img before txt in a double block.
        self._modulation_layers = [module.lin for module in self.modules() if isinstance(module, Modulation)]
        self._modulation_layers.append(self.final_layer.modulation_layer)
        self._joined: JoinedLinear | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.latent_in.weight.dtype

    @property
    def attention_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values in attention."""
        return self._part_dtype(self.arithmetic.attention_accumulation)

    def _part_dtype(self, precision: str) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32) if precision == "fp32" else self.dtype

    def prepare_for_graph(self) -> None:
        """Joins the weights of all modulations and separates the two parts of each linear2, so that a traced graph holds them
        as they are used. The state dict stays upstream's, and a later load_state_dict(assign=True) would not be noticed.
        """
        self._joined = JoinedLinear(self._modulation_layers)
        for module in self.modules():
            if isinstance(module, SingleStreamBlock):
                module.split_linear2()

    def _modulations(self, vec: Tensor) -> Iterator[Tensor]:
        """The product of each modulation layer, [B, 1, its width]."""
        active = F.silu(vec)  #                                                                   [B, D]
        if self._joined is not None:
            return iter(self._joined(active))
        return (layer(active)[:, None, :] for layer in self._modulation_layers)

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        """One velocity evaluation.

        latents [B, L, C], t [B] in [0, 1] (0 noise, 1 data), context [B, T, context width], guidance [B] (the raw scale,
        guidance-distilled weights only) -> velocity [B, L, C] in the dtype of latents.

        Raises ValueError when guidance is given to a model without the embedding, or missing for one with it.
        """
        if (guidance is not None) != self.config.guidance_embed:
            wanted = "given to a guidance-distilled model" if self.config.guidance_embed else "None for a base model"
            raise ValueError(f"guidance must be {wanted}, got {'None' if guidance is None else 'a tensor'}")
        vec = self.time_in(t)  #                                                                  [B, D]
        if guidance is not None:
            vec = vec + self.guidance_in(guidance)  #                                             [B, D]
        branches = (Branch(context.shape[1], latents.shape[1]),)
        return self._velocity(latents, context, vec, branches)  #                                 [B, L, C]

    def guided(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor, *, form: str | None = None) -> Tensor:
        """One velocity with classifier-free guidance, v_u + s (v_c - v_u), exact, in one pass over a longer sequence.

        Shapes as in forward; guidance_scale [B]. The unconditional branch has an all-zero context. Its T tokens are equal, and
        they stay equal through every block, because there is no positional encoding. So one null token replaces them in every
        linear layer. In attention, either the bias ln(T) gives its key the weight of T keys, or its key and its value are
        repeated T times. The sequence is [context T | latents L | null token | latents L].

        form: bias or repeat; None takes that of `arithmetic`. Raises ValueError for another form and for a guidance-distilled
        model.
        """
        if self.config.guidance_embed:
            raise ValueError(
                "guided must be called on a base model, got guidance-distilled weights\nhint: call forward with guidance=scale"
            )
        context_tokens, latent_tokens = context.shape[1], latents.shape[1]
        null_branch = self._null_branch(context_tokens, latent_tokens, form, context.device)
        copies = null_branch.context_tokens
        null = context.new_zeros(context.shape[0], copies, context.shape[2])  #                   [B, copies, context width]
        img = torch.cat([latents, latents], dim=1)  #                                             [B, 2*L, C]
        txt = torch.cat([context, null], dim=1)  #                                                [B, T+copies, context width]
        branches = (Branch(context_tokens, latent_tokens), null_branch)
        both = self._velocity(img, txt, self.time_in(t), branches)  #                             [B, 2*L, C]
        conditional, unconditional = torch.split(both, [latent_tokens, latent_tokens], dim=1)  #  [B, L, C] each
        scale = guidance_scale.to(both.dtype)[:, None, None]  #                                   [B, 1, 1]
        return unconditional + scale * (conditional - unconditional)  #                           [B, L, C]

    def _null_branch(self, context_tokens: int, latent_tokens: int, form: str | None, device: torch.device) -> Branch:
        """The unconditional branch, whose null token stands for `context_tokens` tokens."""
        if check_form(form or self.arithmetic.guided_form) == "repeat":
            return Branch(1, latent_tokens, repeats=context_tokens)
        bias = null_token_bias(context_tokens, self.attention_dtype, device)  #                   [copies]
        key_bias = torch.cat([bias, bias.new_zeros(latent_tokens)])  #                            [copies+L]
        return Branch(bias.shape[0], latent_tokens, key_bias)

    def _velocity(self, latents: Tensor, context: Tensor, vec: Tensor, branches: tuple[Branch, ...]) -> Tensor:
        layout = Layout(branches, self.attention_backend, self.attention_dtype)
        stream_dtype, values = self._part_dtype(self.arithmetic.residual), self._modulations(vec)
        img = self.latent_in(latents.to(self.dtype)).to(stream_dtype)  #                          [B, L, D]
        txt = self.cond_in(context.to(self.dtype)).to(stream_dtype)  #                            [B, T, D]
        for block in self.double_blocks:
            img, txt = block(img, txt, next(values), next(values), layout)  #                     [B, L, D], [B, T, D]
        x = layout.join(txt, img)  #                                                              [B, N, D]
        for block in self.single_blocks:
            x = block(x, next(values), layout)  #                                                 [B, N, D]
        _, img = layout.split(x)  #                                                               [B, L, D]
        return self.final_layer(img, next(values)).to(latents.dtype)  #                           [B, L, C]
