"""Code that several models use stands in git once; every other model's folder has a symbolic link to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PYTHON_MODELS = (
    "dit",
    "dit_guided",
    "conditioner",
    "background",
    "sampler",
    "sampler_unary",
    "preprocess",
    "vae",
    "field",
    "mesh",
    "mesh_unary",
)


def code_of(root: Path, model: str) -> list[Path]:
    return sorted((root / "model_repository" / f"hunyuan3d_{model}" / "1").glob("*.py"))


def test_links_are_relative_and_stay_inside_the_repository(root: Path) -> None:
    links = [path for model in PYTHON_MODELS for path in code_of(root, model) if path.is_symlink()]
    assert links
    for link in links:
        folder = link.readlink().parent
        assert (
            folder.name == "1" and folder.parents[1] == Path("../..") and link.readlink().name == link.name and link.is_file()
        )
        assert not link.resolve().is_symlink()


def test_no_code_stands_twice(root: Path) -> None:
    texts = [path.read_text() for model in PYTHON_MODELS for path in code_of(root, model) if not path.is_symlink()]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("model", PYTHON_MODELS)
def test_a_folder_holds_every_module_that_its_code_imports(model: str, root: Path) -> None:
    """A deployed folder is a copy without links, so nothing may come from another one."""
    paths = code_of(root, model)
    ours = {path.stem for other in PYTHON_MODELS for path in code_of(root, other)} - {"model"}
    imported: set[str] = set()
    for path in paths:
        assert "sys.path" not in path.read_text(), path
        for node in ast.walk(ast.parse(path.read_text())):
            imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            imported |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    assert imported & ours <= {path.stem for path in paths}
    assert "model" in {path.stem for path in paths}
