"""Plausible mistakes in a path, each of which the quality gate must catch: name -> context manager that makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from hunyuan3d_export.dit import Hunyuan3DDiT, layers, model
from hunyuan3d_export.shapes import decoding, reference
from hunyuan3d_export.shapes.meshes import BOUNDS, Triangles
from hunyuan3d_export.shapevae import PRESETS as SHAPE_PRESETS
from hunyuan3d_export.shapevae import model as shapevae

Mutant = Callable[[], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def _guided_scale(change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    true = Hunyuan3DDiT.guided

    def guided(self, latents, t, context, guidance_scale):
        return true(self, latents, t, context, change(guidance_scale))

    with mock.patch.object(Hunyuan3DDiT, "guided", guided):
        yield


@contextlib.contextmanager
def _velocity_flipped() -> Iterator[None]:
    true = Hunyuan3DDiT.guided
    with mock.patch.object(Hunyuan3DDiT, "guided", lambda self, *inputs: -true(self, *inputs)):
        yield


def _context_after_latents(self, txt, img):
    """Joins the streams in the wrong order, while they are still split in the right order."""
    txt_parts = torch.split(txt, [branch.context_tokens for branch in self.branches], dim=-2)
    img_parts = torch.split(img, [branch.latent_tokens for branch in self.branches], dim=-2)
    return torch.cat([part for pair in zip(img_parts, txt_parts, strict=True) for part in pair], dim=-2)


@contextlib.contextmanager
def _shift_and_scale_swapped() -> Iterator[None]:
    true = layers.Modulation.parts

    def parts(self, values):
        return tuple(layers.Modulate(part.scale, part.shift, part.gate) for part in true(self, values))

    with mock.patch.object(layers.Modulation, "parts", parts):
        yield


def _one_token(context_tokens, dtype, device):
    return _TRUE_BIAS(1, dtype, device) + 0 * context_tokens


_TRUE_BIAS = model.null_token_bias
_TRUE_EMBEDDING = layers.timestep_embedding
_TRUE_SIGMAS = reference.sigmas

MUTANTS: dict[str, Mutant] = {
    "velocity sign flipped": _velocity_flipped,
    # 10000^(-k/128) is 1000^(-k/128) to the power 4/3
    "max_period 10000": lambda: mock.patch.object(
        layers, "timestep_embedding", lambda t, frequencies: _TRUE_EMBEDDING(t, frequencies ** (4 / 3))
    ),
    "context after latents": lambda: mock.patch.object(layers.Layout, "join", _context_after_latents),
    "shift and scale swapped": _shift_and_scale_swapped,
    "sigmas reversed": lambda: mock.patch.object(reference, "sigmas", lambda *args: _TRUE_SIGMAS(*args)[::-1]),
    # v_c + s (v_u - v_c) is v_u + (1 - s) (v_c - v_u)
    "unconditional and conditional swapped": lambda: _guided_scale(lambda scale: 1 - scale),
    "guidance ignored": lambda: _guided_scale(torch.ones_like),
    "missing ln(T)": lambda: mock.patch.object(model, "null_token_bias", _one_token),
}


@contextlib.contextmanager
def _q_norm_without_bias() -> Iterator[None]:
    true = shapevae.CrossAttention.forward

    def forward(self, x, k, v, backend):
        with mock.patch.object(self.attention.q_norm, "bias", torch.nn.Parameter(torch.zeros(64), requires_grad=False)):
            return true(self, x, k, v, backend)

    with mock.patch.object(shapevae.CrossAttention, "forward", forward):
        yield


@contextlib.contextmanager
def _not_divided_by_the_scale_factor() -> Iterator[None]:
    true = shapevae.ShapeVAEDecoder.keys_values
    factor = SHAPE_PRESETS["shapes"].scale_factor
    with mock.patch.object(shapevae.ShapeVAEDecoder, "keys_values", lambda self, latents: true(self, latents * factor)):
        yield


@contextlib.contextmanager
def _axis_flipped() -> Iterator[None]:
    true = shapevae.ShapeVAEDecoder.field
    flip = torch.tensor([1.0, 1.0, -1.0])
    with mock.patch.object(shapevae.ShapeVAEDecoder, "field", lambda self, queries, k, v: true(self, queries * flip, k, v)):
        yield


@contextlib.contextmanager
def _axes_swapped() -> Iterator[None]:
    true = shapevae.ShapeVAEDecoder.field
    with mock.patch.object(
        shapevae.ShapeVAEDecoder, "field", lambda self, queries, k, v: true(self, queries[..., [2, 1, 0]], k, v)
    ):
        yield


def _one_point_too_many(places, resolution):
    return places * (2 * BOUNDS / (resolution + 1)) - BOUNDS


@contextlib.contextmanager
def _vertices_by_one_cell_more() -> Iterator[None]:
    """Upstream's mistake: R + 1 points along a side are taken for R + 1 cells, when vertices are mapped."""
    true = decoding.mesh_of

    def mesh_of(field, resolution):
        mesh = true(field, resolution)
        places = (mesh.vertices + BOUNDS) * resolution / (2 * BOUNDS)
        return Triangles(_one_point_too_many(places, resolution), mesh.faces)

    with mock.patch.object(decoding, "mesh_of", mesh_of):
        yield


# Mistakes in the shape decoder and in what makes meshes of its field.
MESH_MUTANTS: dict[str, Mutant] = {
    "q_norm without bias": _q_norm_without_bias,
    "latents not divided by scale_factor": _not_divided_by_the_scale_factor,
    "an axis flipped": _axis_flipped,
    "two axes swapped": _axes_swapped,
    "vertices mapped with R + 1": _vertices_by_one_cell_more,
}
