"""The options of sampling and meshing: declared once, shown by every method, checked by every method, passed on by every method."""

from __future__ import annotations

import asyncio
import inspect
import pydoc
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract, options

KINDS = {
    "sample": options.SampleOptions,
    "stream": options.StreamOptions,
    "decode": options.DecodeOptions,
    "decode_stream": options.DecodeOptions,
    "generate": options.GenerateOptions,
    "generate_stream": options.GenerateStreamOptions,
}
METHODS = [(kind, name) for kind in (h.AsyncClient, h.Client) for name in KINDS if hasattr(kind, name)]
# A value for each option, other than its default.
VALUES: dict[str, Any] = {
    "steps": 2,
    "guidance_scale": 2.5,
    "seed": 5,
    "num_latents": 9,
    "latents": np.ones((1, 3, 64), np.float32),
    "negative_context": np.ones((1, 5, contract.CONTEXT_WIDTH), np.float16),
    "schedule": "flow_match",
    "preview_every": 3,
    "tolerance": 0.125,
    "resolution": 384,
    "format": "ply",
    "max_faces": 40_000,
    "keep": 0.25,
    "level": 0.5,
    "method": "dense",
    "remove_background": False,
    "timeout_s": 7.0,
    "request_id": "mine-7",
    "headers": {"traceparent": "00-1-2-01"},
}
FIRST = {"decode": "latents", "generate": "image"}  # the name of a method's argument, where it is not `context`
OF_A_CALL = {"timeout_s", "request_id", "headers"}
FLIPS = [(name, option.name) for name, kind in KINDS.items() for option in options.options_of(kind)]


def test_the_options_are_the_samplers_inputs() -> None:
    inputs = {spec.name for spec in contract.SAMPLER_INPUTS} - {"context"}
    assert {option.name for option in options.options_of(options.StreamOptions)} == inputs | OF_A_CALL


def test_the_options_of_a_decode_are_the_mesh_models_inputs() -> None:
    inputs = {spec.name for spec in contract.MESH_INPUTS} - {"latents"}
    assert {option.name for option in options.options_of(options.DecodeOptions)} == inputs | OF_A_CALL
    sampling = {option.name for option in options.options_of(options.SampleOptions)} - {"latents", "negative_context"}
    assert {option.name for option in options.options_of(options.GenerateOptions)} == inputs | sampling | {"remove_background"}


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_each_method_shows_its_options(kind: Any, name: str) -> None:
    method = getattr(kind, name)
    signature, hints, page = inspect.signature(method), typing.get_type_hints(method), pydoc.render_doc(method)
    assert list(signature.parameters)[:2] == ["self", FIRST.get(name.removesuffix("_stream"), "context")]
    shown = {key: value for key, value in signature.parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
    declared = options.options_of(KINDS[name])
    assert set(shown) == {option.name for option in declared} and len(signature.parameters) == 2 + len(shown)
    for option in declared:
        assert (shown[option.name].default, shown[option.name].annotation) == (option.default, option.type)
        assert hints[option.name] == option.type
        assert f"{option.name}: {option.text}" in method.__doc__ and option.name in page
    assert "return" in hints


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_each_method_refuses_other_keywords(kind: Any, name: str) -> None:
    async def main() -> None:
        found = getattr(h.AsyncClient(transport=h.MockTransport()), name)(b"x", stepz=3)
        await found

    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'stepz'"):
        if kind is h.AsyncClient:
            asyncio.run(main())
        else:
            with h.Client(transport=h.MockTransport()) as client:
                getattr(client, name)(b"x", stepz=3)


def test_arguments_are_checked_as_pythons_own_are() -> None:
    with h.Client(transport=h.MockTransport()) as client:
        with pytest.raises(TypeError, match=r"stream\(\) missing a required argument: 'context'"):
            client.stream()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"stream\(\) too many positional arguments"):
            client.stream(VALUES["negative_context"], 3)  # type: ignore[call-arg]
        assert client.sample(context=VALUES["negative_context"]).shape[0] == 1


def run(name: str, given: dict[str, Any]) -> h.MockTransport:
    """The transport of one call, which holds the call's requests."""
    transport = h.MockTransport()
    with h.Client(transport=transport) as client:
        firsts = {"image": b"picture", "latents": np.zeros((1, 3, 64)), "context": np.zeros((1, 5, contract.CONTEXT_WIDTH))}
        first = firsts[FIRST.get(name.removesuffix("_stream"), "context")]
        found: Any = getattr(client, name)(first, **given)
        if isinstance(found, Iterator):
            list(found)
    return transport


@pytest.mark.parametrize(("name", "option"), FLIPS)
def test_each_method_passes_each_option_on(name: str, option: str) -> None:
    before, after = run(name, {}), run(name, {option: VALUES[option]})
    if option == "timeout_s":
        assert [round(limit_s) for limit_s in before.timeouts_s] == [300] * len(before.requests)
        assert [round(limit_s) for limit_s in after.timeouts_s] == [7] * len(after.requests)
        return
    if option in ("request_id", "headers"):
        assert {str(getattr(request, option)) for request in after.requests} == {str(VALUES[option])}
        assert all(getattr(request, option) != VALUES[option] for request in before.requests)
        return
    takes = contract.MESH if option in [spec.name for spec in contract.MESH_OPTIONS] else contract.SAMPLER
    takes = contract.IMAGE_CONTEXT if option == contract.REMOVE_BACKGROUND.name else takes
    was, now = (next(each.inputs for each in calls.requests if each.model == takes) for calls in (before, after))
    sent = now[option]
    assert option not in was or not np.array_equal(was[option], sent)
    expected = VALUES[option].encode() if isinstance(VALUES[option], str) else VALUES[option]
    assert (sent == expected).all()
    assert all(option not in each.inputs for each in after.requests if each.model != takes)


@pytest.mark.parametrize("name", [name for name in vars(h.Client) if not name.startswith("_")])
def test_the_methods_of_the_blocking_client_have_their_own_names(name: str) -> None:
    method = getattr(h.Client, name)
    assert (method.__name__, method.__qualname__) == (name, f"Client.{name}") and method.__doc__
    assert method.__module__ == h.Client.__module__ and not inspect.iscoroutinefunction(method)
    if hasattr(h.AsyncClient, name) and name not in ("close", "from_env"):
        assert method.__doc__ == getattr(h.AsyncClient, name).__doc__
    assert typing.get_type_hints(method)["return"] is not None or name == "close"


def test_coroutine_functions_stay_so() -> None:
    for name in KINDS:
        found = not name.endswith("stream")
        assert inspect.iscoroutinefunction(getattr(h.AsyncClient, name)) is found


def test_a_decorated_function_must_take_options() -> None:
    def method(self: object, *, steps: int) -> None: ...

    with pytest.raises(TypeError, match=r"method must end with \*\*options"):
        options.takes(options.SampleOptions)(method)


WRONG: list[tuple[str, str]] = [
    ("client.sample(x, steps=3, seed=[1, 2], latents=x)", ""),
    ("client.sample(x, stepz=3)", 'Unexpected keyword argument "stepz"'),
    ("client.sample(x, steps='3')", 'expected "int | None"'),
    ("client.sample(x, preview_every=1)", 'Unexpected keyword argument "preview_every"'),
    ("client.generate('a.png', latents=x)", 'Unexpected keyword argument "latents"'),
    ("client.stream(x, schedule=3)", 'expected "str | None"'),
    ("with client.stream(x) as opened: step: h.Step = next(opened)", ""),
    ("client.decode(x, resolution='384')", 'expected "int | None"'),
    ("faces: int = client.generate('a.png', resolution=384, steps=3).faces", ""),
    ("steps: list[h.Step] = list(client.stream(x, preview_every=2))", ""),
    ("later.generate_stream('a.png', num_latents='9')", 'expected "int | None"'),
]


def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    check: Callable[[list[str]], tuple[str, str, int]] = api.run
    head = "import numpy as np, hunyuan3d_client as h\nx, client, later = np.ones(1), h.Client(), h.AsyncClient()\n"
    (tmp_path / "use.py").write_text(head + "\n".join(line for line, _ in WRONG) + "\n")
    told, _, _ = check(["--config-file=", "--cache-dir", str(tmp_path), str(tmp_path / "use.py")])
    errors = {int(line.split(":")[1]): line for line in told.splitlines() if " error: " in line}
    for number, (line, expected) in enumerate(WRONG, start=3):
        assert expected in errors.pop(number, "") if expected else number not in errors, (line, told)
    assert not errors, told
