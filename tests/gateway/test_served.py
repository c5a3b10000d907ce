"""The interfaces before a real server: what clients of other Hunyuan3D servers rely on, bytes included."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_doubles import picture
from starlette.testclient import TestClient

from hunyuan3d_client import Client
from hunyuan3d_export.server.embedded import Endpoints
from hunyuan3d_gateway.app import create_app
from hunyuan3d_gateway.gateway import Gateway
from hunyuan3d_gateway.settings import Settings

pytestmark = pytest.mark.served
WAIT_S = 120.0
IMAGE = base64.b64encode(picture("teal", (96, 80))).decode()
QUICK = {"octree_resolution": 32, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def http(endpoints: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(servers=endpoints.grpc, data=tmp_path_factory.mktemp("data"), drain_s=0.0)
    with TestClient(create_app(Gateway(settings)), base_url="http://localhost") as client:
        until(lambda: client.get("/health/ready").status_code == 200, "the gateway must find the server")
        yield client


def until(true: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def check_glb(data: bytes) -> None:
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))


def test_an_image_alone_and_the_same_body_twice(http: TestClient, root: Path, tmp_path: Path) -> None:
    """Assertions 1 and 6: a GLB of the declared length, identical bytes, the seed 1234, no error of gltf-validator."""
    answers = [http.post("/generate", json={"image": IMAGE, **QUICK, **more}) for more in ({}, {"seed": 1234}, {"seed": 5})]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    check_glb(answers[0].content)
    assert answers[0].content == answers[1].content != answers[2].content
    validator = root / "build" / "test" / "gltf-validator" / "node_modules" / "gltf-validator"
    if shutil.which("node") is None or not validator.exists():
        pytest.skip("gltf-validator is not installed: tests/mesh/test_mesh_files.py installs it where there is npm")
    (tmp_path / "a.glb").write_bytes(answers[0].content)
    script = f"require({json.dumps(str(validator))}).validateBytes(new Uint8Array(require('fs').readFileSync('a.glb')))"
    script += ".then(report => console.log(report.issues.numErrors))"
    done = subprocess.run(["node", "-e", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "0"


def test_what_needs_a_missing_stage_is_refused_in_words(http: TestClient) -> None:
    """Assertion 2."""
    for body in ({"image": IMAGE, "texture": True}, {"text": "a red car"}, {"mesh": "Z2xURg=="}):
        found = http.post("/generate", json=body)
        assert found.status_code != 200 and found.json()["text"] and found.json()["error_code"] == 1


def test_a_body_of_2_1_and_unknown_keys(http: TestClient) -> None:
    """Assertion 3."""
    body = {
        "image": IMAGE,
        "remove_background": True,
        "num_chunks": 8000,
        "face_count": 1000,
        "type": "glb",
        "nothing": {"a": 1},
    }
    found = http.post("/generate", json={**body, **QUICK, "guidance_scale": 5.0, "texture": False, "seed": 2**32 - 1})
    assert found.status_code == 200
    check_glb(found.content)


def test_send_and_status_equal_generate(http: TestClient) -> None:
    """Assertion 4, with the words of shapes."""
    body = {"text": "torus", "seed": 11, **QUICK}
    uid = http.post("/send", json=body).json()["uid"]
    until(lambda: http.get(f"/status/{uid}").json()["status"] != "processing", "the job must end")
    made = base64.b64decode(http.get(f"/status/{uid}").json()["model_base64"])
    assert made == http.post("/generate", json=body).content
    failing = http.post("/send", json={**body, "octree_resolution": 8, "num_inference_steps": 1, "seed": 1}).json()["uid"]
    until(lambda: http.get(f"/status/{failing}").json()["status"] != "processing", "a job ends, well or not")


def test_a_delete_frees_the_sampler_within_one_step(http: TestClient, endpoints: Endpoints) -> None:
    """Assertion 5: keys of the reply, content 404 then 200, and a DELETE halfway."""
    files = {"image": ("a.png", base64.b64decode(IMAGE))}
    job = http.post("/v1/meshes", files=files, data={"num_inference_steps": "200", "resolution": "32"}).json()
    assert http.get(f"/v1/meshes/{job['id']}/content").status_code == 404
    until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["step"] >= 3, "the sampler must begin")
    with Client(endpoints.grpc) as client:
        assert active(endpoints) == 1
        step = http.get(f"/v1/jobs/{job['id']}").json()["step"]
        assert http.delete(f"/v1/meshes/{job['id']}").json()["status"] == "deleted"
        made = metric(endpoints, "hunyuan3d_steps_total")
        assert client.health().ready
    until(lambda: active(endpoints) == 0, "the sampler must be free")
    time.sleep(1.0)  # long enough for many steps
    assert metric(endpoints, "hunyuan3d_steps_total") - made <= 1
    assert step < 150, "the sample was far from its end"
    done = http.post("/v1/meshes", json={"input_image": IMAGE, "num_inference_steps": 3, "resolution": 32}).json()
    until(lambda: http.get(f"/v1/meshes/{done['id']}").json()["status"] == "completed", "the server must be free for others")
    check_glb(http.get(f"/v1/meshes/{done['id']}/content").content)


def active(endpoints: Endpoints) -> float:
    return metric(endpoints, "hunyuan3d_active_samples")


def metric(endpoints: Endpoints, name: str) -> float:
    import urllib.request

    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_progress_is_true_and_previews_grow(http: TestClient) -> None:
    id = http.post("/v1/meshes", json={"prompt": "torus", "num_inference_steps": 24, "resolution": 48}).json()["id"]
    states: list[dict[str, Any]] = []
    with http.stream("GET", f"/v1/jobs/{id}/events") as answer:
        states += [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    shares = [state["share"] for state in states]
    assert shares == sorted(shares) and len(set(shares)) > 8 and states[-1]["state"] == "completed"
    assert {"sampling", "meshing"} <= {state["stage"] for state in states}
    previews = [base64.b64decode(state["preview"]) for state in states if state["preview"]]
    assert len(previews) >= 3 and all(len(each) % 3 == 0 for each in previews) and len(set(previews)) == len(previews)


def test_callers_side_by_side_get_their_own_meshes(http: TestClient) -> None:
    found: dict[int, bytes] = {}

    def ask(seed: int) -> None:
        found[seed] = http.post("/generate", json={"text": "cone", "seed": seed, **QUICK}).content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == 4
