"""Text prompts as context tokens without an encoder: every word is a fixed pseudo-random vector."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

CONTEXT_WIDTH = 1536


def embed_prompt(prompt: str) -> NDArray[np.float16]:
    """The context of a prompt: one token per word, [T, 1536] float16.

    A word's vector holds only +1 and -1, read from the bits of a Philox generator keyed by the word's SHA-256: exact in
    every dtype, equal on every machine and numpy, and nearly orthogonal to every other word's. Case and repeated
    spaces do not matter; the order of the words gives the order of the tokens, which the model does not see.

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
