"""The interface of upstream's own server, without a server behind it."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from conftest import Running
from gateway_doubles import mesh_of, picture

IMAGE = base64.b64encode(picture()).decode()


def wait_for(running: Running, uid: str) -> dict[str, Any]:
    while (found := running.http.get(f"/status/{uid}").json())["status"] == "processing":
        pass
    return dict(found)


def test_an_image_alone_works_and_twice_gives_the_same_bytes(running: Running) -> None:
    first, second = (running.http.post("/generate", json={"image": IMAGE}) for _ in range(2))
    assert first.status_code == 200 and first.headers["content-type"] == "model/gltf-binary"
    assert first.content == second.content == mesh_of(1234).data


def test_a_body_of_2_1_passes_and_unknown_keys_reach_nothing(running: Running) -> None:
    body = {
        "image": IMAGE, "remove_background": True, "seed": 2**32 - 1, "octree_resolution": 256, "num_inference_steps": 5,
        "guidance_scale": 5.0, "num_chunks": 8000, "face_count": 40000, "texture": False, "type": "glb", "request_id": "mine",
        "timeout_s": 0.001, "headers": {"a": "b"}, "method": "dense",
    }  # fmt: skip
    sent = running.http.post("/send", json=body).json()
    assert wait_for(running, sent["uid"])["status"] == "completed"
    job = running.http.portal.call(running.gateway.queue.get, sent["uid"])  # type: ignore[union-attr]
    assert dict(job.options) == {
        "seed": 2**32 - 1, "resolution": 256, "steps": 5, "guidance_scale": 5.0, "max_faces": 40000, "remove_background": True,
    }  # fmt: skip


def test_send_then_status_gives_the_bytes_of_generate(running: Running) -> None:
    uid = running.http.post("/send", json={"image": IMAGE, "seed": 7}).json()["uid"]
    found = wait_for(running, uid)
    assert base64.b64decode(found["model_base64"]) == running.http.post("/generate", json={"image": IMAGE, "seed": 7}).content


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"image": IMAGE, "texture": True}, 422, "without textures"),
        ({"mesh": "Z2xURg=="}, 422, "without textures"),
        ({"text": "a red car"}, 422, "does not know: a, red, car"),
        ({}, 422, "A picture is missing"),
        ({"image": "not base64!"}, 422, "base64"),
        ({"image": base64.b64encode(b"hello").decode()}, 422, "not a picture"),
        ({"image": IMAGE, "octree_resolution": 4000}, 422, "resolution must be between 8 and 512"),
        ({"image": IMAGE, "num_inference_steps": 0}, 422, "steps must be between 1 and 200"),
        ({"image": IMAGE, "seed": -1}, 422, "seed"),
        ({"image": IMAGE, "type": "fbx"}, 422, "format must be one of"),
        ({"image": IMAGE, "guidance_scale": "high"}, 422, "guidance_scale"),
    ],
)
def test_refusals_have_upstreams_form(body: dict[str, Any], status: int, words: str, running: Running) -> None:
    for path in ("/generate", "/send"):
        found = running.http.post(path, json=body)
        assert found.status_code == status and found.json()["error_code"] == 1 and words in found.json()["text"]
    assert running.maker.begun == []


def test_text_without_a_stage_is_refused(running: Running) -> None:
    import dataclasses

    running.servers.able = dataclasses.replace(running.servers.able, prompts=False)
    found = running.http.post("/generate", json={"text": "torus"})
    assert found.status_code == 422 and "not of words" in found.json()["text"]


def test_an_unreadable_body_is_400(running: Running) -> None:
    found = running.http.post("/generate", content=b"{", headers={"content-type": "application/json"})
    assert found.status_code == 400 and found.json()["error_code"] == 1


def test_a_failed_job_is_an_error_and_never_processing_for_ever(running: Running) -> None:
    from hunyuan3d_client import InvalidInput, ModelFailed

    running.maker.errors = [ModelFailed("boom\nhint: x"), InvalidInput("resolution must be small\nhint: y")]
    uid = running.http.post("/send", json={"image": IMAGE}).json()["uid"]
    found = wait_for(running, uid)
    assert found["status"] == "error" and "The model failed: boom" in found["message"]
    failed = running.http.post("/generate", json={"image": IMAGE})
    assert failed.status_code == 422 and "resolution must be small" in failed.json()["text"]


def test_a_probe_of_an_unknown_uid_answers_at_once_while_jobs_run(running: Running) -> None:
    running.close_gate()
    for _ in range(3):
        running.http.post("/send", json={"image": IMAGE})
    found = running.http.get("/status/test")
    assert found.status_code == 200 and found.json()["status"] == "error"
    running.open_gate()


def test_words_become_a_mesh(running: Running) -> None:
    assert running.http.post("/generate", json={"text": "two flat tori"}).status_code == 200
