"""The options that callers may set, each with the range that all interfaces share, as names of the client's own options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from hunyuan3d_client import contract

from .failures import refused
from .settings import Settings

SEEDS = (0, 2**63 - 1)
GUIDANCE = (0.0, 100.0)
FACES = (0, 10_000_000)
WORDS = 1000  # most characters of a prompt
RemoveBackground = Annotated[
    bool | None, Field(description="cut the subject out of pictures without transparency; left out: as the server is set")
]


def checked(settings: Settings, **given: Any) -> dict[str, Any]:
    """The options that are not None. Raises Refused for one outside its range."""
    ranges: dict[str, tuple[float, float]] = {
        "steps": (1, settings.max_steps),
        "seed": SEEDS,
        "guidance_scale": GUIDANCE,
        "resolution": (contract.RESOLUTIONS[0], settings.max_resolution),
        "max_faces": FACES,
        "remove_background": (False, True),
    }
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        least, most = ranges[name]
        if not least <= value <= most:
            text = f"{name} must be between {least:g} and {most:g}, got {value:g}."
            raise refused(422, "out_of_range", text, f"Leave {name} out for the default.")
    return found


def prompt(text: str | None) -> str:
    """A prompt's words. Raises Refused for one that is too long or holds characters that are no text."""
    words = " ".join((text or "").split())
    if len(words) > WORDS or not words.isprintable():
        raise refused(422, "bad_prompt", f"The prompt must be at most {WORDS} printable characters.", "Shorten it.")
    return words


def known_words(words: str) -> None:
    """Refuses words that the weights of `shapes` were not trained on: they would draw something else without saying so."""
    from hunyuan3d_client.shapes.words import ATTRIBUTES, NOUNS, unknown_words

    if unknown := unknown_words(words):
        known = f"{', '.join(ATTRIBUTES)}; {', '.join(NOUNS)}"
        shown = ", ".join(unknown[:5])
        raise refused(422, "unknown_words", f"This server does not know: {shown}.", f"It knows these words: {known}.")
