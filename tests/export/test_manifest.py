"""A manifest vouches for the files of an artifact. Every kind of damage must be noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan3d_export.manifest import (
    FORMAT,
    NAME,
    Manifest,
    ManifestError,
    code_digest,
    file_digests,
    read_artifacts,
    reusable,
    versions_of,
)

HINT = "do it again"
MADE_FROM = {"weights": {"preset": "tiny", "seed": 0}, "precision": "fp32"}
FIELDS: dict[str, Any] = {
    "model": "net",
    "made_from": MADE_FROM,
    "serving": {"steps": 50},
    "versions": {"torch": "2"},
    "files": {"weights.bin": "0" * 64},
    "tensors": {"t": {"dtype": "FLOAT"}},
    "memory": {"weights_bytes": 1},
    "format": FORMAT,
}


def make_artifact(folder: Path, *, model: str = "net") -> Manifest:
    folder.mkdir(parents=True)
    (folder / "graph").write_bytes(b"nodes")
    (folder / "weights").write_bytes(bytes(range(256)))
    manifest = Manifest(model=model, made_from=MADE_FROM, serving={}, versions={}, files=file_digests(folder))
    manifest.write(folder)
    return manifest


def edit(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**values, **fields}))


def test_round_trip(tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "net")
    assert Manifest.read(tmp_path / "net", hint=HINT) == manifest
    assert manifest.files == {
        "graph": hashlib.sha256(b"nodes").hexdigest(),
        "weights": hashlib.sha256(bytes(range(256))).hexdigest(),
    }
    assert read_artifacts(tmp_path, hint=HINT) == {tmp_path / "net": manifest}
    assert reusable(tmp_path / "net", MADE_FROM)
    assert not reusable(tmp_path / "net", {**MADE_FROM, "precision": "fp16"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / NAME).unlink(), f"must hold .*{NAME}, found none"),
    "no file": (lambda folder: (folder / "weights").unlink(), "must hold weights, found none"),
    "truncated": (lambda folder: (folder / "weights").write_bytes(bytes(range(255))), "must have sha256 .*, got "),
    "longer": (lambda folder: (folder / "weights").write_bytes(bytes(257)), "must have sha256 .*, got "),
    "empty": (lambda folder: (folder / "graph").write_bytes(b""), "must have sha256 .*, got "),
    "other digest": (lambda folder: edit(folder, files={"graph": "0" * 64}), "must have sha256 000000000000..., got "),
    "newer format": (lambda folder: edit(folder, format=FORMAT + 1), f"must be a manifest of format {FORMAT}, got: format 2"),
    "unknown field": (lambda folder: edit(folder, mode="fast"), f"must be a manifest of format {FORMAT}, got: .*mode"),
    "half written": (lambda folder: (folder / NAME).write_text('{"model": "net", '), f"must be a manifest of format {FORMAT}"),
    "not text": (lambda folder: (folder / NAME).write_bytes(b"\xff\xfe\x00\x80"), f"must be a manifest of format {FORMAT}"),
    "a list": (lambda folder: (folder / NAME).write_text("[]"), f"must be a manifest of format {FORMAT}"),
    "escaping file": (lambda folder: edit(folder, files={"../other": "0"}), "got: the name '../other'"),
    "absolute file": (lambda folder: edit(folder, files={"/etc/hosts": "0"}), "got: the name '/etc/hosts'"),
    "escaping model": (lambda folder: edit(folder, model=".."), "got: the name '..'"),
    "no files": (lambda folder: edit(folder, files={}), "got: no files"),
    "renamed folder": (lambda folder: folder.rename(folder.parent / "copy"), "copy must be named net"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    make_artifact(tmp_path / "net")
    make_artifact(tmp_path / "sound", model="sound")
    damage, message = DAMAGE[name]
    damage(tmp_path / "net")
    # Beside artifacts, a folder without a manifest is passed over. Read by itself, it is an error.
    if name == "no manifest":
        assert list(read_artifacts(tmp_path, hint=HINT)) == [tmp_path / "sound"]
        with pytest.raises(ManifestError, match=f"(?s){message}.*\nhint: {HINT}$"):
            Manifest.read(tmp_path / "net", hint=HINT)
    else:
        with pytest.raises(ManifestError, match=f"(?s){message}.*\nhint: {HINT}$"):
            read_artifacts(tmp_path, hint=HINT)
    assert not reusable(tmp_path / "net", MADE_FROM)


def test_nothing_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            ManifestError, match=f"{re.escape(str(root))} must hold artifact folders .*, found none\nhint: {HINT}"
        ):
            read_artifacts(root, hint=HINT)


def test_what_a_killed_export_left_is_no_artifact(tmp_path: Path) -> None:
    make_artifact(tmp_path / "net")
    make_artifact(tmp_path / ".net.4711.retired", model="net")
    assert list(read_artifacts(tmp_path, hint=HINT)) == [tmp_path / "net"]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=8), LEAVES, max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from([*FIELDS, "extra"]), JSON, max_size=3), dropped=st.sets(st.sampled_from([*FIELDS]))
)
def test_any_json_is_a_manifest_or_a_manifest_error(
    changes: dict[str, Any], dropped: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hypothesis"
    folder.mkdir(exist_ok=True)
    values = {key: value for key, value in {**FIELDS, **changes}.items() if key not in dropped}
    (folder / NAME).write_text(json.dumps(values))
    assert not reusable(folder, MADE_FROM), "none of its files is there"
    try:
        manifest = Manifest.read(folder, hint=HINT)
    except ManifestError as error:
        assert str(error).endswith(f"\nhint: {HINT}")
    else:
        assert not dropped - {"format", "tensors", "memory"} and manifest.format == FORMAT
        with pytest.raises(ManifestError):
            manifest.check_files(folder, hint=HINT)


def test_write_is_whole_and_sorted(tmp_path: Path) -> None:
    manifest = Manifest(**FIELDS)
    manifest.write(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert json.loads(text) == dataclasses.asdict(manifest) == FIELDS
    assert list(json.loads(text)) == sorted(FIELDS)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_versions_of_what_is_installed() -> None:
    import torch

    assert versions_of("torch", "no-such-distribution") == {"torch": torch.__version__}


def test_code_digest_sees_names_and_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1\n")
    second.write_text("y = 2\n")
    digest = code_digest([first, second])
    assert code_digest([second, first]) == digest
    second.write_text("y = 3\n")
    changed = code_digest([first, second])
    second.rename(tmp_path / "c.py")
    assert len({digest, changed, code_digest([first, tmp_path / "c.py"])}) == 3
