"""The shapes beside the forward's lines stand in one column: the formatter does not align comments, so a test has to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hunyuan3d_export.dit import layers, model

FILES = {module.__name__.rpartition(".")[2]: Path(str(module.__file__)) for module in (layers, model)}
SHAPE = re.compile(r"\S  # +(?=\[.*\](?: each)?$)")


@pytest.mark.parametrize("name", FILES)
def test_shapes_stand_in_one_column(name: str) -> None:
    found = {
        number: match.end()
        for number, line in enumerate(FILES[name].read_text().splitlines(), 1)
        if (match := SHAPE.search(line))
    }
    assert len(found) > 10
    assert set(found.values()) == {98}, found
