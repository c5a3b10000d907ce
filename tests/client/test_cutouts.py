"""Cut-outs, and what is told of a picture's background, against a mock server."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract
from hunyuan3d_client.transport import Tensors, _zeros

PICTURE = np.zeros((4, 4, 3), np.uint8)


def server(background: str = contract.REMOVED) -> h.MockTransport:
    """A server that tells what became of backgrounds, and that cuts out."""

    def answer(request: h.Request) -> Iterable[Tensors]:
        facts = {
            "background": np.array([background.encode()], np.object_),
            "subject_share": np.array([0.25], np.float32),
        }
        if request.model == contract.PREPROCESS:
            return [{**facts, "cutout": np.array([b"\x89PNG, and zeros at its end\0\0"], np.object_)}]
        answers = [dict(each) for each in _zeros(request)]
        return [{**each, **facts} for each in answers] if request.model == contract.IMAGE_CONTEXT else answers

    return h.MockTransport(answer)


def test_cutout(tmp_path: Path) -> None:
    transport = server()
    with h.Client(transport=transport) as client:
        found = client.cutout(PICTURE)
    assert (found.background, found.subject_share, found.data[-2:]) == ("removed", 0.25, b"\0\0")
    (request,) = transport.requests
    assert (request.model, request.outputs) == (contract.PREPROCESS, ("background", "subject_share", "cutout"))
    assert request.inputs["remove_background"].tolist() == [True]
    assert found.save(tmp_path / "cut.png").read_bytes() == found.data and str(found.data) not in repr(found)
    with pytest.raises(h.InvalidInput, match="path must be a .png file, which has transparency, got .*cut.jpg"):
        found.save(tmp_path / "cut.jpg")


def test_a_server_without_a_remover_cannot_cut_out() -> None:
    with h.Client(transport=server(contract.NO_REMOVER)) as client:
        with pytest.raises(h.ModelNotReady, match=r"hunyuan3d_background must be ready .*\nhint: hunyuan3d-export background"):
            client.cutout(PICTURE)
        assert client.generate(PICTURE).statistics["background"] == [contract.NO_REMOVER]


def test_several_views_and_wrong_values_are_refused_before_anything_is_sent() -> None:
    transport = server()
    with h.Client(transport=transport) as client:
        with pytest.raises(h.InvalidInput, match="image must be one picture, got 2 views"):
            client.cutout([PICTURE, PICTURE])
        unsent = {"timeout_s": None, "request_id": None, "headers": None, "seed": 0, "preview_every": 0}
        for refused in (
            lambda: client.condition(PICTURE, remove_background="no"),
            lambda: client.generate_stream(PICTURE, remove_background="no"),
            lambda: client._picture_stream(PICTURE, {**unsent, "remove_background": "no"}),
        ):
            with pytest.raises(h.InvalidInput, match="remove_background must be True or False, got 'no'"):
                refused()
    assert [request.model for request in transport.requests] == []


@pytest.mark.parametrize("asked", [None, True, False])
def test_generate_and_condition_pass_the_wish_on_and_tell_the_facts(asked: bool | None) -> None:
    transport = server()
    with h.Client(transport=transport) as client:
        mesh = client.generate(PICTURE, remove_background=asked)
        assert client.condition(PICTURE, remove_background=asked).shape == (1, 1370, 1536)
    assert (mesh.statistics["background"], mesh.statistics["subject_share"]) == (["removed"], [0.25])
    sent = [request.inputs for request in transport.requests if request.model == contract.IMAGE_CONTEXT]
    assert len(sent) == 2
    for inputs in sent:
        assert [value.tolist() for name, value in inputs.items() if name == "remove_background"] == (
            [] if asked is None else [[asked]]
        )


def test_a_server_of_before_tells_nothing() -> None:
    with h.Client(transport=h.MockTransport()) as client:
        assert "background" not in client.generate(PICTURE).statistics
        with pytest.raises(h.ModelFailed, match=r"hunyuan3d_preprocess must answer with a cutout, got \['pixels'\]"):
            client.cutout(PICTURE)
