"""The error tree, and its table of gRPC statuses."""

from __future__ import annotations

import ast
import builtins
import pickle
import re
from pathlib import Path

import grpc
import pytest

import hunyuan3d_client
from hunyuan3d_client import errors, files
from hunyuan3d_client.cli import EXIT_CODES

LEAVES = errors.Hunyuan3DError.__subclasses__()


def test_every_status_but_ok_has_a_class() -> None:
    assert set(errors.BY_STATUS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_every_class_is_reachable_drawn_exported_and_hinted() -> None:
    assert {*errors.BY_STATUS.values(), errors.Cancelled} == set(LEAVES), "the client itself says that it was cancelled"
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in LEAVES)
    for kind in LEAVES:
        assert getattr(hunyuan3d_client, kind.__name__) is kind and "hint" in vars(kind)


def test_classes_are_also_what_callers_already_catch() -> None:
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.DeadlineExceeded, TimeoutError)
    assert issubclass(errors.ServerUnavailable, ConnectionError)


@pytest.mark.parametrize("kind", LEAVES)
def test_each_class_has_one_exit_code(kind: type[errors.Hunyuan3DError]) -> None:
    assert [code for parent, code in EXIT_CODES.items() if issubclass(kind, parent)] == [EXIT_CODES[kind]]


def test_every_class_under_raises_exists() -> None:
    named = set()
    for path in Path(hunyuan3d_client.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                for clause in re.findall(r"Raises ([^.]*)", ast.get_docstring(node) or ""):
                    named |= set(re.findall(r"\b[A-Z]\w+", clause))
    assert {"InvalidInput", "ServerUnavailable"} <= named
    for name in named:
        found = getattr(hunyuan3d_client, name, None) or getattr(files, name, None) or getattr(builtins, name)
        assert issubclass(found, Exception)


def test_message_form() -> None:
    error = errors.invalid("steps", "an integer", 1.5, "round it")
    assert str(error) == "steps must be an integer, got 1.5\nhint: round it"
    assert (error.status, error.request_id, error.model, error.attempt) == (None, None, None, 0)


@pytest.mark.parametrize("kind", LEAVES)
def test_errors_survive_pickling(kind: type[errors.Hunyuan3DError]) -> None:
    """A process pool sends errors that way."""
    error = kind("words", status=grpc.StatusCode.UNAVAILABLE, request_id="id", model="m", attempt=2)
    if isinstance(error, errors.Overloaded):
        error.retry_after_s = 4.0
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind and str(found) == "words" and vars(found) == vars(error)


def test_a_status_error_survives_pickling() -> None:
    error = hunyuan3d_client.StatusError(grpc.StatusCode.INTERNAL, "words")
    error.server = hunyuan3d_client.MockTransport(lambda _: [])
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), found.status, str(found)) == (type(error), grpc.StatusCode.INTERNAL, "words")
    assert found.server is None, "a connection stays in its process"
