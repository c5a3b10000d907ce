"""What `hunyuan3d-export` does, in words that need neither torch nor typer."""

from __future__ import annotations

import ast
from pathlib import Path

INTRODUCTION = """Turn Hunyuan3D-2 weights into a running Triton server.

The steps in their order: `onnx` exports the networks of a checkpoint, `verify` compares them with torch, `engine` compiles
TensorRT plans on the GPU that will run them, `deploy` places the artifacts into a model repository, `serve` starts a server.
`serve CHECKPOINT` does all of it. The command `hunyuan3d` then talks to the server."""

_COMMANDS = Path(__file__).parent / "commands"


def introduction() -> str:
    """The introduction and the commands, each with the first line of its docstring. Read from the source: nothing is imported."""
    trees = {path.name: ast.parse(path.read_text()) for path in sorted(_COMMANDS.glob("*.py"))}
    functions = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.FunctionDef)}
    (loop,) = (node for node in trees["app.py"].body if isinstance(node, ast.For))
    names = [node.id for node in ast.walk(loop.iter) if isinstance(node, ast.Name)]
    lines = [f"  {name:12} {(ast.get_docstring(functions[name]) or '').splitlines()[0]}" for name in names]
    return "\n".join([INTRODUCTION.replace("`", ""), "", "Commands:", *lines])
