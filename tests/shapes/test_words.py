"""The words of this preset's prompts, and the context that the client makes of them."""

import numpy as np

import hunyuan3d_client.shapes
import hunyuan3d_export.shapes
from hunyuan3d_client.shapes import CONTEXT_WIDTH, embed_prompt
from hunyuan3d_client.shapes.words import ATTRIBUTES, NOUNS
from hunyuan3d_export.shapes import PROMPTS


def test_words_are_nearly_orthogonal():
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vectors = embed_prompt(" ".join(words)).astype(np.float64)
    cosines = vectors @ vectors.T / CONTEXT_WIDTH
    assert np.abs(cosines - np.eye(len(words))).max() < 0.12


def test_the_client_knows_exactly_the_words_of_the_prompts():
    assert {word for prompt in PROMPTS for word in prompt.split()} == {*ATTRIBUTES, *NOUNS}


def test_the_words_and_the_codec_are_the_clients() -> None:
    for name in hunyuan3d_client.shapes.__all__:
        assert getattr(hunyuan3d_export.shapes, name) is getattr(hunyuan3d_client.shapes, name)
