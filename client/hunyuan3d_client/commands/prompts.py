"""The words of a prompt as a condition of `sample`, and drawings of the points that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy.typing as npt

from .. import contract, errors
from ..array_files import load
from ..install import install_hint
from ..shapes import decode_points, embed_prompt, pictures
from ..shapes.words import ATTRIBUTES, NOUNS, unknown_words
from ..transport import Health

_PROMPTED = "shapes"  # the only preset that was trained on words


def condition(context: Path | None, prompt: str | None, drawing: Path | None) -> npt.NDArray[Any]:
    """The condition tokens of the command `sample`: from a file, or of a prompt's words."""
    if (context is None) == (prompt is None):
        raise errors.invalid("condition", "--context or --prompt", "both" if context else "neither", "name one of them")
    if prompt is None:
        if drawing is not None:
            raise errors.invalid("--picture and --ply", "given with --prompt", str(drawing), "only `shapes` latents are points")
        return cast(npt.NDArray[Any], load(context, "context"))
    try:
        tokens = embed_prompt(prompt)
    except ValueError as error:
        raise errors.invalid("--prompt", "words", repr(prompt), 'for example --prompt "two flat tori"') from error
    if unknown := unknown_words(prompt):
        known = f"{', '.join(ATTRIBUTES)} and a noun: {', '.join(NOUNS)}"
        raise errors.invalid("--prompt", f"words out of {known}", ", ".join(unknown), 'for example --prompt "two flat tori"')
    return tokens


def check_served(state: Health) -> None:
    """A prompt means something only to the weights of `shapes`; other weights would draw noise."""
    if state.preset != _PROMPTED:
        served = next((str(state.weights[name]) for name in contract.DENOISERS if name in state.weights), "unknown weights")
        hint = "deploy and serve the preset shapes, or give --context to this server"
        raise errors.invalid("--prompt", f"sent to a server of the preset {_PROMPTED}", f"a server of {served}", hint)


def check_picture(path: Path | None) -> None:
    """Raises InvalidInput for a picture of no known kind, before the sampling."""
    if path is not None:
        try:
            pictures.picture_format(path)
        except ValueError as error:
            raise errors.invalid("--picture", " or ".join(pictures.FORMATS), str(path), "--picture tori.png") from error


def draw(latents: npt.NDArray[Any], prompt: str, picture: Path | None, ply: Path | None) -> None:
    """Writes the points of latents [B, L, 64] as a picture and those of the first sample as PLY, where these are asked for."""
    if picture is None and ply is None:
        return
    clouds = decode_points(latents)
    if ply is not None:
        pictures.save_ply(clouds[0], ply)
    if picture is not None:
        try:
            pictures.save_grid({f"{prompt} {i}" if i else prompt: cloud for i, cloud in enumerate(clouds)}, picture)
        except ImportError as error:
            raise errors.invalid("--picture", "drawn by matplotlib", str(error), install_hint("shapes")) from error
