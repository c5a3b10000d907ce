"""The options, exit codes and consoles that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..dit import PRESETS
from ..networks import NETWORKS

EXIT_FAILED = 1  # a check did not pass, or the server did not start
EXIT_MISUSE = 2  # the input or an option is wrong
EXIT_INTERRUPTED = 130

console = Console()
errors = Console(stderr=True)

PresetOption = Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="A .safetensors or .ckpt file; without it, random weights of the preset.")
]
PipelineOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="A .safetensors or .ckpt file, a folder that holds one beside its config.yaml, or an id on the hub; without it, random weights of the preset.",
    ),
]
SubfolderOption = Annotated[
    str | None, typer.Option(help="The folder of the weights inside the checkpoint, such as hunyuan3d-dit-v2-0.")
]
VaeOption = Annotated[
    Path | None,
    typer.Option(help="A VAE's file or folder, also one of the same repository on the hub; it replaces the checkpoint's VAE."),
]
NetworkOption = Annotated[
    list[str] | None, typer.Option(help=f"Only this network: {', '.join(NETWORKS)}; repeatable. Default: all that there are.")
]
ForRepositoryOption = Annotated[
    Path | None,
    typer.Option(help="Model repository that the artifacts are for: it refuses weights that it cannot take at once."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of random weights.")]
PrecisionOption = Annotated[str, typer.Option(help="fp32, fp16 or bf16 weights and activations.")]
# Their values and defaults are those of dit.network.OPTIONS; None leaves the default.
GuidedFormOption = Annotated[
    str | None,
    typer.Option(help="bias (adds ln T to one key) or repeat (that key T times, no mask); default bias, for plans repeat."),
]
AttentionAccumulationOption = Annotated[
    str | None, typer.Option(help="native, or fp32: a half-precision graph computes attention in float32.")
]
ResidualOption = Annotated[
    str | None, typer.Option(help="native, or fp32: a half-precision graph keeps its residual stream in float32.")
]
AttentionOption = Annotated[str, typer.Option(help="op (the Attention operator) or decomposed (MatMul and Softmax).")]


def chosen(**options: str | None) -> dict[str, str]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def plain(*lines: str) -> None:
    """Prints lines to stdout as they are: not wrapped, coloured or cut, so that a pipe and a terminal get the same."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
