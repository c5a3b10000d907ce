"""What importing the package does, and does not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hunyuan3d_client as h


def test_import_brings_no_heavy_library_and_does_no_work() -> None:
    code = "import sys, threading, hunyuan3d_client as h; print(sorted(m for m in {'torch', 'tensorrt', 'typer', 'rich', 'onnx'} if m in sys.modules), threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["[]", "1"]


def test_a_process_that_forgets_to_close_ends_cleanly(kserve: Any) -> None:
    code = f"import hunyuan3d_client as h; c = h.Client('{kserve.url}'); print(c.health().version)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "9.9\n", "")


def test_all_is_sorted_and_whole() -> None:
    assert h.__all__ == sorted(h.__all__) and all(hasattr(h, name) for name in h.__all__)
    public = {name for name, value in vars(h).items() if isinstance(value, type) and not name.startswith("_")}
    assert public == {name for name in h.__all__ if isinstance(getattr(h, name), type)}


def test_the_contract_alone_needs_no_grpc() -> None:
    code = "import sys; from hunyuan3d_client import contract; print(sorted({'grpc', 'tritonclient'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_client_stands_alone() -> None:
    """The export imports the client; an import the other way would make a circle of packages."""
    imported = set()
    for path in Path(h.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    assert "numpy" in imported and "hunyuan3d_export" not in imported


def test_shapes_need_numpy_alone() -> None:
    code = "import sys; from hunyuan3d_client.shapes import embed_prompt, pictures; print(sorted({'grpc', 'matplotlib', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'hunyuan3d_client' has no attribute 'Klient'"):
        _ = h.Klient  # type: ignore[attr-defined]
