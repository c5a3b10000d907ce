"""`hunyuan3d-export conditioner`; transformers is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .cli_options import SeedOption
from .onnx_from_torch import OnnxOptions


def conditioner(
    out: Annotated[Path, typer.Option(help="Folder for the artifact, beside the denoisers' or on its own.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A shape pipeline's checkpoint or a DINOv2-giant folder of transformers; without it, random weights."
        ),
    ] = None,
    variant: Annotated[str, typer.Option(help="Of random weights: tiny or giant.")] = "tiny",
    seed: SeedOption = 0,
    image_size: Annotated[int, typer.Option(help="518, or 1022 as v2-mini-turbo takes.")] = 518,
    views: Annotated[int, typer.Option(help="1, or 4 for the multi-view weights.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16 weights and activations.")] = "fp32",
    attention: Annotated[str, typer.Option(help="op (the Attention operator) or decomposed (MatMul and Softmax).")] = "op",
) -> None:
    """Image encoder weights -> its ONNX graph, for `deploy` and `engine`. What still matches is kept."""
    try:
        from .conditioner.export import ConditionerSource, export_conditioner
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{error.name} must be installed for the image encoder, got none\nhint: pip install "hunyuan3d-triton[conditioner]"'
        ) from error
    source = ConditionerSource(path=checkpoint, variant=variant, seed=seed, image_size=image_size, views=views)
    folder = export_conditioner(source, out, OnnxOptions(precision=precision, attention=attention))
    Console().print(str(folder), soft_wrap=True)
