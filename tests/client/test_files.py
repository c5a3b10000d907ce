"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan3d_client import InvalidInput
from hunyuan3d_client.array_files import writable
from hunyuan3d_client.files import atomic_path


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "x.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == target.parent and not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["x.txt"] and target.read_text() == "whole"


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"] and target.read_text() == "old"


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "x.npz", "must be a .npy"), (tmp_path / "misspelt" / "x.npy", "in a folder that exists")):
        with pytest.raises(InvalidInput, match=words), writable(path):
            pytest.fail("the work has begun")
    assert not list(tmp_path.iterdir())
