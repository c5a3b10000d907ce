"""Files and folders appear whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hunyuan3d_export.files import atomic_folder, atomic_path, separate, sha256


def test_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("content")
        assert not target.exists() and temporary.parent == target.parent
    assert target.read_text() == "content" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_failed_file_keeps_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_file_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [[], ["old"]])
def test_folder_replaces_the_old_one(tmp_path: Path, before: list[str]) -> None:
    target = tmp_path / "folder"
    for name in before:
        target.mkdir()
        (target / name).touch()
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()
        assert [path.name for path in target.iterdir()] == before if before else not target.exists()
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]


def test_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert list(target.iterdir()) == [] and list(tmp_path.iterdir()) == [target]


def test_failed_swap_restores_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError), atomic_folder(target) as temporary:
        temporary.rmdir()  # so that no folder can take the old folder's place
    assert [path.name for path in target.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [target]


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 40_000
    path.write_bytes(data)
    assert sha256(path) == hashlib.sha256(data).hexdigest()


def test_nothing_replaces_what_it_is_made_from(tmp_path: Path) -> None:
    assert separate(tmp_path / "out", tmp_path / "in") == tmp_path / "out"
    with pytest.raises(ValueError, match="out must be another folder than what is read, got"):
        separate(tmp_path / "in" / ".." / "in", tmp_path / "other", tmp_path / "in")
