"""Text prompts as context tokens without an encoder: each word stands for a fixed pseudo-random vector."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ..contract import CONTEXT_WIDTH

# The words that the weights of `shapes` were trained on. A noun's plural is a word of its own, for prompts with "two".
ATTRIBUTES = ("two", "flat", "tall")
NOUNS = (
    *("sphere", "cube", "cylinder", "cone", "torus", "tetrahedron", "octahedron", "helix"),
    *("spheres", "cubes", "cylinders", "cones", "tori", "tetrahedra", "octahedra", "helices"),
)


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt, in their order, that the weights of `shapes` were not trained on."""
    return [word for word in prompt.lower().split() if word not in (*ATTRIBUTES, *NOUNS)]


def embed_prompt(prompt: str) -> NDArray[np.float16]:
    """The context tokens of a prompt, one for each word: [T, 1536] float16.

    A word's vector holds only +1 and -1, read from the bits of a Philox generator whose key is the word's SHA-256. Such a
    vector is exact in every dtype, the same on every machine and in every numpy, and nearly orthogonal to the vectors of
    other words. Case and repeated spaces do not matter. The tokens come in the order of the words, but the model does not
    see their order.

    Any word has a vector; unknown_words() tells those that mean nothing to the weights.

    Raises ValueError for a prompt without words.
    """
    words = prompt.lower().split()
    if not words:
        raise ValueError(f"prompt must hold at least one word, got {prompt!r}")
    return np.stack([_word_vector(word) for word in words])


def _word_vector(word: str) -> NDArray[np.float16]:
    key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(CONTEXT_WIDTH // 64).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")  # [1536]
    return (2.0 * bits - 1.0).astype(np.float16)
