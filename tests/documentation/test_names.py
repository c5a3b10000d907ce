"""Names in the documents are true: files, folders, modules and links exist; README stays short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
)
TREE = ("client", "export", "gateway", "model_repository", "bench", "docs", "docker", "examples", "tests")
FILES = {
    str(path.relative_to(ROOT))
    for folder in TREE
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
} | {path.name for path in ROOT.iterdir() if path.is_file()}
FOLDERS = {str(parent) for name in FILES for parent in Path(name).parents}
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|ya?ml|env|pbtxt|sh|png|Dockerfile)")
FOLDER = re.compile(r"[\w.-]+(?:/[\w.-]+)*/")
MODULE = re.compile(r"hunyuan3d_(?:client|export|gateway)(?!_)(?:\.\w+)+")
# Written by the commands around them, or names of the reader's own.
NOT_OURS = {"pictures/", "meshes/", ".cache/", "build/turbo", "build/", "configs/", "picture.png", "tori.png"}


def spans(text: str) -> list[str]:
    """What stands between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def ends_of(names: set[str], name: str) -> bool:
    """Whether a name is one of `names`, or the last parts of one."""
    return any(full == name or full.endswith(f"/{name}") for full in names)


def wrong_names(text: str) -> list[str]:
    """Names of files, folders and modules of this project in a text that do not exist."""
    found = []
    for span in spans(text):
        words = span.split()
        found += [word for word in words if FILE.fullmatch(word) and word not in NOT_OURS and not ends_of(FILES, word)]
        if (
            FOLDER.fullmatch(span)
            and not span.startswith("build/")
            and span not in NOT_OURS
            and not ends_of(FOLDERS, span[:-1])
        ):
            found.append(span)
    return found + [name for name in MODULE.findall(text) if not exists(name)]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    return "." in name and importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_exist(document: Path) -> None:
    assert wrong_names(document.read_text()) == []


def test_wrong_names_are_found() -> None:
    text = "`dit/config.py` `dit/no.py` `no/` `docker/` `docs/no.md` hunyuan3d_export.networks hunyuan3d_export.configs"
    assert wrong_names(text) == ["dit/no.py", "no/", "docs/no.md", "hunyuan3d_export.configs"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_changelog_names_what_moved() -> None:
    rows = re.findall(r"^\| (`hunyuan3d_.*) \| (`hunyuan3d_.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for old, new in rows:
        assert not [name for name in MODULE.findall(old) if exists(name)], old
        assert MODULE.findall(new) and all(exists(name) for name in MODULE.findall(new)), new


def test_python_blocks_are_python() -> None:
    for document in DOCUMENTS:
        for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
            compile(block, str(document), "exec")


def test_every_table_has_headers() -> None:
    for document in DOCUMENTS:
        lines = document.read_text().splitlines()
        headers = [above for above, below in zip(lines, lines[1:], strict=False) if re.fullmatch(r"(\|-+)+\|", below)]
        assert [header for header in headers if re.search(r"\|\s*\|", header)] == [], document


def test_readme_is_short_and_begins_with_a_command() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and lines.index("```bash") < 20
    assert all(any(line.startswith(f"| `{name}") or f"`{name}/`" in line for line in lines) for name in TREE if name != "tests")
