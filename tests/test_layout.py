"""The structure of the code, computed from its own import statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = {"hunyuan3d_client": "client", "hunyuan3d_export": "export", "hunyuan3d_gateway": "gateway"}
FOLDERS = {"dit", "conditioner", "background", "shapevae", "attention", "engines", "server", "commands", "shapes", "gpu_check"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of all modules of the packages."""
    found = {}
    for package, folder in PACKAGES.items():
        base = root / folder
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of `known` that a module imports anywhere in its text, except for type checkers alone."""
    tree = ast.parse(path.read_text())
    for_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                wanted = f"{source}.{alias.name}"
                if wanted in known:
                    yield wanted
                elif source in known:
                    yield source


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that are left after nodes without arrows were removed again and again: none without a circle."""
    left = {node: set(targets) & set(graph) - {node} for node, targets in graph.items()}
    while free := {node for node, targets in left.items() if not targets}:
        left = {node: targets - free for node, targets in left.items() if node not in free}
    return sorted(left)


@pytest.fixture(scope="module")
def imports(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: set(imported(name, path, known)) for name, path in known.items()}


def test_no_circle_of_files(imports: dict[str, set[str]]) -> None:
    assert circle(imports) == []


def test_no_circle_of_packages(imports: dict[str, set[str]]) -> None:
    def room(module: str) -> str:
        package, *rest = module.split(".")
        return f"{package}.{rest[0]}" if rest and rest[0] in {*FOLDERS, "interfaces"} else module

    rooms: dict[str, set[str]] = {}
    for module, targets in imports.items():
        rooms.setdefault(room(module), set()).update(room(target) for target in targets)
    assert circle(rooms) == []
    whole: dict[str, set[str]] = {}
    for module, targets in imports.items():
        whole.setdefault(module.partition(".")[0], set()).update(target.partition(".")[0] for target in targets)
    assert circle(whole) == []


def test_the_test_finds_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_the_folders_are_those_of_the_design(root: Path) -> None:
    export = root / "export" / "hunyuan3d_export"
    assert {path.parent.name for path in export.glob("*/__init__.py")} == FOLDERS
    assert {path.name for path in (export / "dit").glob("*.py")} >= {"config.py", "model.py", "checkpoint.py", "network.py"}
    assert {path.name for path in (export / "conditioner").glob("*.py")} >= {
        "config.py",
        "model.py",
        "checkpoint.py",
        "network.py",
    }


def test_no_model_borrows_anothers_folder(root: Path) -> None:
    for path in (root / "model_repository").rglob("*.py"):
        assert "sys.path" not in path.read_text(), path
