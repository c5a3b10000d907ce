"""/v1/meshes, /v1/jobs and /v1/infer, without a server behind them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
import trimesh
from conftest import Running, Start
from gateway_doubles import mesh_of, picture

PICTURE = picture()
IMAGE = base64.b64encode(PICTURE).decode()
KEYS = {
    "id", "object", "model", "status", "progress", "created_at", "format", "url", "completed_at", "expires_at", "error",
    "file_path", "file_size_bytes", "peak_memory_mb", "inference_time_s",
}  # fmt: skip


def ended(running: Running, id: str) -> dict[str, Any]:
    while (found := running.http.get(f"/v1/meshes/{id}").json())["status"] in ("queued", "in_progress"):
        pass
    return dict(found)


def test_multipart_and_json_make_the_same_mesh(running: Running) -> None:
    form = running.http.post("/v1/meshes", files={"image": ("chair.png", PICTURE)}, data={"seed": "5"})
    plain = running.http.post("/v1/meshes", json={"input_image": IMAGE, "seed": 5})
    for found in (form, plain):
        assert found.status_code == 200 and found.json().keys() >= KEYS and found.json()["object"] == "mesh"
        done = ended(running, found.json()["id"])
        assert (done["status"], done["progress"], done["faces"]) == ("completed", 100, 12)
        content = running.http.get(done["url"])
        assert content.headers["content-type"] == "model/gltf-binary" and content.content == mesh_of(5).data
        assert len(content.content) == done["file_size_bytes"]


@pytest.mark.parametrize(("said", "asked"), [("false", False), ("true", True), ("", None)])
def test_the_background_is_removed_as_the_caller_says(said: str, asked: bool | None, running: Running) -> None:
    form = running.http.post("/v1/meshes", files={"image": ("a.png", PICTURE)}, data={"remove_background": said})
    plain = running.http.post("/v1/meshes", json={"input_image": IMAGE, "remove_background": asked})
    for found in (form, plain):
        job = running.http.portal.call(running.gateway.queue.get, found.json()["id"])  # type: ignore[union-attr]
        assert job.options.get("remove_background") is asked


def test_content_is_404_until_the_job_is_done(running: Running) -> None:
    running.close_gate()
    id = running.http.post("/v1/meshes", json={"input_image": IMAGE}).json()["id"]
    assert running.http.get(f"/v1/meshes/{id}/content").status_code == 404
    running.open_gate()
    assert ended(running, id)["status"] == "completed"
    assert running.http.get(f"/v1/meshes/{id}/content").status_code == 200


@pytest.mark.parametrize("format", ["glb", "obj", "stl", "ply"])
def test_every_format_holds_the_same_triangles(format: str, running: Running) -> None:
    id = running.http.post("/v1/meshes", json={"input_image": IMAGE, "seed": 3}).json()["id"]
    ended(running, id)
    found = running.http.get(f"/v1/meshes/{id}/content", params={"format": format, "download": True})
    assert found.headers["content-disposition"] == f'attachment; filename="mesh-{id[:8]}.{format}"'
    mesh = trimesh.load_mesh(io.BytesIO(found.content), file_type=format)
    mesh = mesh.to_mesh() if isinstance(mesh, trimesh.Scene) else mesh
    assert len(mesh.faces) == 12 and abs(mesh.volume - 1.03) < 1e-5


def test_delete_stops_the_work_and_removes_the_files(running: Running) -> None:
    running.close_gate()
    id = running.http.post("/v1/meshes", json={"input_image": IMAGE}).json()["id"]
    while not running.maker.begun:
        running.http.get("/health")
    assert running.http.delete(f"/v1/meshes/{id}").json()["status"] == "deleted"
    while not running.maker.cancelled:
        running.http.get("/health")
    running.open_gate()
    assert running.maker.cancelled == [id]
    assert ended(running, id)["status"] == "deleted"
    while list(running.gateway.store.folder.glob(f"{id}*")):
        running.http.get("/health")
    id = running.http.post("/v1/meshes", json={"input_image": IMAGE}).json()["id"]
    ended(running, id)
    running.http.delete(f"/v1/meshes/{id}")
    assert not list(running.gateway.store.folder.glob(f"{id}*"))
    assert running.http.get(f"/v1/meshes/{id}/content").status_code == 404


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"json": {}}, 422),
        ({"json": {"input_image": 5}}, 422),
        ({"json": []}, 400),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 400),
        ({"json": {"input_image": IMAGE, "negative_prompt": "ugly"}}, 422),
        ({"json": {"input_image": [IMAGE] * 5}}, 422),
        ({"json": {"input_image": IMAGE, "url": "http://example.com/a.png"}}, 422),
        ({"files": {"image": ("a.png", b"GIF89a")}}, 422),
        ({"files": {"image": ("a.png", PICTURE[:60])}}, 422),
        ({"json": {"input_image": IMAGE, "seed": 1e400}}, 422),
        ({"json": {"prompt": "torus\ud800"}}, 400),
        ({"json": {"prompt": "torus\x00"}}, 422),
    ],
)
def test_bad_requests(request_: dict[str, Any], status: int, running: Running) -> None:
    if "json" in request_:
        request_ = {"content": json.dumps(request_["json"]).encode(), "headers": {"content-type": "application/json"}}
    found = running.http.post("/v1/meshes", **request_)
    assert found.status_code == status and found.json()["detail"] and found.json()["error"]["code"]


def test_the_list_has_pages(running: Running) -> None:
    ids = [running.http.post("/v1/meshes", json={"prompt": "torus"}).json()["id"] for _ in range(5)]
    page = running.http.get("/v1/meshes", params={"limit": 2, "order": "asc"}).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[:2], True)
    rest = running.http.get("/v1/meshes", params={"after": page["last_id"], "order": "asc"}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (ids[2:], False)
    assert [job["id"] for job in running.http.get("/v1/meshes").json()["data"]] == ids[::-1]
    assert running.http.get("/v1/meshes", params={"limit": 101}).status_code == 422


def test_an_idempotency_key_makes_one_job(running: Running) -> None:
    headers = {"Idempotency-Key": "a1"}
    first, again = (running.http.post("/v1/meshes", json={"prompt": "torus"}, headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"]
    other = running.http.post("/v1/meshes", json={"prompt": "cube"}, headers=headers)
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"
    ended(running, first["id"])
    assert running.maker.begun == [first["id"]]


def test_a_full_queue_is_429_with_a_time_to_come_back(start: Start) -> None:
    running = start(max_queued=2, running=1)
    running.close_gate()
    found = [running.http.post("/v1/meshes", json={"prompt": "torus"}) for _ in range(8)]
    refused = [each for each in found if each.status_code == 429]
    assert refused and all(int(each.headers["retry-after"]) >= 1 for each in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"
    running.open_gate()


def test_events_tell_every_stage_and_the_end(running: Running) -> None:
    running.close_gate()
    id = running.http.post("/v1/meshes", json={"prompt": "torus"}).json()["id"]
    kinds, states = [], []
    with running.http.stream("GET", f"/v1/jobs/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kinds.append(line[7:])
            if line.startswith("data: "):
                states.append(json.loads(line[6:]))
                if states[-1]["stage"] == "sampling":
                    running.open_gate()
    assert kinds[-1] == "end" and set(kinds[:-1]) == {"progress"}
    assert states[-1]["state"] == "completed" and states[-1]["result"]["faces"] == 12
    assert running.http.get("/v1/jobs/nothing/events").status_code == 404


def test_infer_answers_with_artifacts(running: Running) -> None:
    found = running.http.post("/v1/infer", json={"image": f"data:image/png;base64,{IMAGE}", "seed": 9, "mode": "image"})
    (artifact,) = found.json()["artifacts"]
    assert artifact["finishReason"] == "SUCCESS" and artifact["seed"] == 9
    assert base64.b64decode(artifact["base64"]) == mesh_of(9).data
    assert running.http.post("/v1/infer", json={"image": IMAGE, "samples": 4}).status_code == 422


def test_health_ready_and_metrics(running: Running) -> None:
    import dataclasses

    assert running.http.get("/health").json()["status"] == "healthy"
    assert running.http.get("/v1/health/live").status_code == running.http.get("/v1/health/ready").status_code == 200
    running.servers.able = dataclasses.replace(running.servers.able, ready=False)
    assert running.http.get("/health/ready").status_code == 503
    running.http.post("/generate", json={"image": IMAGE})
    text = running.http.get("/metrics").text
    assert 'hunyuan3d_gateway_ended_total{interface="upstream",outcome="completed"} 1.0' in text
    assert 'hunyuan3d_gateway_jobs{state="completed"} 1.0' in text and 'route="/generate",status="200"' in text
