"""Prompts become the same context on every machine and in every process."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hunyuan3d_client.shapes import CONTEXT_WIDTH, embed_prompt

# The checkpoint is trained on these very vectors: a change here makes it useless.
PINNED = "2469083fdd7beef0b98d8386e0068eb0d75806cddfcf34c1384e04da8f25bbd2"


def digest(prompt: str) -> str:
    return hashlib.sha256(embed_prompt(prompt).astype("<f2").tobytes()).hexdigest()


def test_the_vectors_are_the_ones_the_checkpoint_was_trained_on():
    assert digest("two flat cubes") == PINNED


def test_the_hash_seed_of_the_process_changes_nothing():
    code = "import sys; from hunyuan3d_client.shapes import embed_prompt; sys.stdout.write(embed_prompt('two flat cubes').astype('<f2').tobytes().hex())"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, text=True, check=True
    )
    assert hashlib.sha256(bytes.fromhex(found.stdout)).hexdigest() == PINNED


def test_one_token_per_word_in_their_order():
    context = embed_prompt("two flat cubes")
    assert context.shape == (3, CONTEXT_WIDTH) and context.dtype == np.float16
    np.testing.assert_array_equal(context[1], embed_prompt("flat")[0])
    np.testing.assert_array_equal(context, embed_prompt("  Two FLAT\tcubes "))


@given(st.text(min_size=1).filter(lambda text: text.split()))
def test_any_text_has_a_context_of_signs(text):
    context = embed_prompt(text)
    assert context.shape == (len(text.lower().split()), CONTEXT_WIDTH)
    assert (np.abs(context) == 1).all()


@pytest.mark.parametrize("empty", ["", " \n"])
def test_a_prompt_without_words_is_refused(empty):
    with pytest.raises(ValueError, match="at least one word"):
        embed_prompt(empty)
