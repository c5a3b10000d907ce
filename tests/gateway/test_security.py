"""Keys, bounds, pictures, URLs, headers: what strangers may not do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.server
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Start
from gateway_doubles import picture
from PIL import Image

from hunyuan3d_client import InvalidInput
from hunyuan3d_gateway import fetching, keys
from hunyuan3d_gateway.database import Database
from hunyuan3d_gateway.failures import Refused
from hunyuan3d_gateway.pictures import cleaned
from hunyuan3d_gateway.settings import Settings
from hunyuan3d_gateway.store import Store

IMAGE = base64.b64encode(picture()).decode()
BODY = {"input_image": IMAGE}


def test_keys_are_asked_for_and_hashed_at_rest(start: Start, tmp_path: Path) -> None:
    running = start(require_key=True)
    assert running.http.post("/v1/meshes", json=BODY).status_code == 401
    found = running.http.post("/generate", json={"image": IMAGE})
    assert found.status_code == 401 and found.json()["error_code"] == 1 and found.headers["www-authenticate"] == "Bearer"
    alice, bob = (keys.add(running.gateway.database, name) for name in ("alice", "bob"))
    running.gateway.keys._read_at = 0.0
    with_alice, with_bob = ({"Authorization": f"Bearer {key}"} for key in (alice, bob))
    made = running.http.post("/v1/meshes", json=BODY, headers=with_alice)
    assert made.status_code == 200
    assert running.http.get(f"/v1/meshes/{made.json()['id']}", headers={"X-API-Key": alice}).status_code == 200
    for path in (f"/v1/meshes/{made.json()['id']}", f"/v1/jobs/{made.json()['id']}/events"):
        assert running.http.get(path, headers=with_bob).status_code == 404, "another caller's job"
    assert running.http.get("/v1/meshes", headers=with_bob).json()["data"] == []
    assert running.http.get("/metrics").status_code == 401 and running.http.get("/health").status_code == 200
    whole = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("jobs.sqlite3*"))
    assert alice.encode() not in whole and hashlib.sha256(alice.encode()).hexdigest().encode() in whole
    keys.remove(running.gateway.database, "alice")
    running.gateway.keys._read_at = 0.0
    assert running.http.get("/v1/meshes", headers=with_alice).status_code == 401


def test_names_of_keys_are_checked(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'k.sqlite3'}")
    database.create()
    keys.add(database, "alice")
    for name in ("alice", "", "a b", "../x"):
        with pytest.raises(InvalidInput, match="\nhint: "):
            keys.add(database, name)
    with pytest.raises(InvalidInput):
        keys.remove(database, "nobody")
    assert [name for name, _ in keys.names(database)] == ["alice"]
    database.close()


def test_bodies_are_bounded_whether_or_not_they_say_their_length(start: Start) -> None:
    running = start(max_body_bytes=20_000)
    big = json.dumps({"image": "A" * 30_000}).encode()
    kind = {"content-type": "application/json"}
    for content in (big, (big[i : i + 1000] for i in range(0, len(big), 1000))):
        found = running.http.post("/generate", content=content, headers=kind)
        assert found.status_code == 413 and found.json()["error_code"] == 1
    wrong = running.http.post("/generate", content=b"{}", headers={**kind, "content-length": "-5"})
    assert wrong.status_code == 400


@pytest.mark.parametrize("path", ["/generate", "/send", "/v1/meshes", "/v1/infer"])
def test_bodies_that_dribble_are_refused(path: str, start: Start) -> None:
    running = start(body_timeout_s=1)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.3)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    begun = time.monotonic()
    running.http.portal.call(running.http.app, scope, receive, send)  # type: ignore[union-attr]
    assert 0.9 < time.monotonic() - begun < 10
    start_of, body = sent
    assert start_of["status"] == 408 and (b"connection", b"close") in start_of["headers"]
    assert json.loads(body["body"])["error"]["code"] == "too_slow" and b"within 1 s" in body["body"]


def test_a_slow_job_is_no_slow_body(start: Start) -> None:
    running = start(body_timeout_s=1)
    running.close_gate()
    threading.Timer(1.5, running.open_gate).start()
    assert running.http.post("/generate", json={"image": IMAGE}).status_code == 200


def test_every_answer_has_the_headers(start: Start) -> None:
    running = start()
    for path in ("/", "/docs", "/health", "/static/app.js", "/v1/meshes/none", "/nothing"):
        headers = running.http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers


def test_pages_of_other_sites_are_refused_unless_they_are_allowed(start: Start) -> None:
    running = start(cors_origin=("https://friend.example",))
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost", 200),
        ("https://friend.example", 200),
    ):
        found = running.http.post("/v1/meshes", json=BODY, headers={"Origin": origin})
        assert found.status_code == status, origin
    assert found.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_gateway_of_this_machine_answers_to_its_own_names_alone(start: Start) -> None:
    running = start()
    assert running.http.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert running.http.get("/health", headers={"Host": "127.0.0.1:8081"}).status_code == 200


def test_pictures_are_written_anew(start: Start) -> None:
    secret = b"<?php secret ?>"
    image = Image.new("RGB", (40, 30), "red")
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    out = io.BytesIO()
    image.save(out, format="JPEG", exif=exif)
    running = start()
    running.close_gate()
    id = running.http.post("/v1/meshes", files={"image": ("../../etc/passwd", out.getvalue() + secret)}).json()["id"]
    (kept,) = running.gateway.store.folder.iterdir()
    data = kept.read_bytes()
    assert kept.name == f"{id}-0.png" and secret not in data and b"where I live" not in data and b"eXIf" not in data
    with Image.open(io.BytesIO(data)) as found:
        assert found.size == (30, 40), "turned as the EXIF data say"
    running.open_gate()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_a_picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_a_picture"),
        (picture(format="BMP"), "not_a_picture"),
        (picture(format="GIF"), "not_a_picture"),
        (picture(size=(300, 300))[:-200], "damaged_picture"),
        (picture(size=(1100, 1000)), "too_many_pixels"),
        (picture(size=(400, 10)), "too_thin"),
    ],
)
def test_what_is_no_usable_picture_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(Refused) as caught:
        cleaned(data, max_pixels=1_000_000)
    assert caught.value.failure.code == code and caught.value.failure.text and caught.value.failure.hint


def test_alpha_and_16_bits_are_kept_as_they_look() -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    with pytest.raises(Refused, match="shows nothing"):
        cleaned(png_of(Image.fromarray(pixels)), max_pixels=10_000)
    pixels[5:15, 5:15] = 200, 10, 10, 255
    with Image.open(io.BytesIO(cleaned(png_of(Image.fromarray(pixels)), max_pixels=10_000))) as found:
        assert found.mode == "RGBA" and found.getchannel("A").getbbox() == (5, 5, 15, 15)
    grey = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    with Image.open(io.BytesIO(cleaned(png_of(grey), max_pixels=10_000))) as found:
        assert np.asarray(found)[0, 0].tolist() == [128, 128, 128]


def png_of(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """A site on this machine: a picture, a redirect, and a file that is too large."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/away" else 200)
            if self.path == "/away":
                self.send_header("Location", "http://127.0.0.1/other")
            self.end_headers()
            self.wfile.write(picture() if self.path == "/a.png" else bytes(50_000))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_urls_lead_only_to_allowed_hosts_at_public_addresses(site: int) -> None:
    url, local = f"http://127.0.0.1:{site}", ("127.0.0.0/8",)
    assert fetching.fetch(f"{url}/a.png", hosts=["127.0.0.1"], networks=local, max_bytes=40_000) == picture()
    for path, hosts, networks, code in (
        ("/a.png", [], local, "urls_are_off"),
        ("/a.png", ["example.org"], local, "url_not_allowed"),
        ("/a.png", ["127.0.0.1"], (), "url_not_allowed"),
        ("/away", ["127.0.0.1"], local, "url_failed"),
        ("/big", ["127.0.0.1"], local, "too_large"),
    ):
        with pytest.raises(Refused) as caught:
            fetching.fetch(url + path, hosts=hosts, networks=networks, max_bytes=40_000)
        assert caught.value.failure.code == code, path


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "gopher://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/",
     "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "http://user@localhost/", "http://[", "http://localhost:99999/"],
)  # fmt: skip
def test_tricks_with_urls_are_refused(url: str) -> None:
    hosts = ["localhost", "::1", "::ffff:127.0.0.1", "0.0.0.0", "169.254.169.254", "10.0.0.1"]
    with pytest.raises(Refused) as caught:
        fetching.fetch(url, hosts=hosts, max_bytes=1000)
    assert caught.value.failure.code in ("url_not_allowed", "bad_url")


def test_the_store_takes_names_of_jobs_alone_and_is_bounded(tmp_path: Path, start: Start) -> None:
    store = Store(tmp_path / "files", most_bytes=100)
    for name in ("../x.png", "a.png", "0" * 32 + ".py", "0" * 32 + "-0.png/..", ""):
        with pytest.raises(ValueError, match="name must be"):
            store.write(name, b"x")
    store.write("0" * 32 + ".glb", bytes(80))
    assert store.size_bytes() == 80 and not store.fits(21) and store.fits(20)
    running = start(store_bytes=2**20)
    noisy = np.random.default_rng(0).integers(0, 255, (330, 330, 3), np.uint8)
    data = png_of(Image.fromarray(noisy))
    done = [running.http.post("/generate", json={"image": base64.b64encode(data).decode(), "seed": seed}) for seed in range(6)]
    assert {answer.status_code for answer in done} == {200}, "the oldest results make room"
    assert running.gateway.store.size_bytes() <= 2**20


def test_each_job_has_lines_in_the_audit_log_without_what_it_shows(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    running = start()
    with caplog.at_level(logging.INFO, logger="hunyuan3d_gateway.audit"):
        assert running.http.post("/generate", json={"text": "two flat tori"}).status_code == 200
    lines = [json.loads(record.message) for record in caplog.records if record.name == "hunyuan3d_gateway.audit"]
    assert [line["event"] for line in lines] == ["taken", "ended"] and len({line["job"] for line in lines}) == 1
    assert lines[0]["caller"].startswith("address:") and lines[1]["outcome"] == "completed"
    assert "tori" not in json.dumps(lines)


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"attempts": 0}, {"max_body_bytes": 1}, {"allow_url_network": ("x",)}):
        with pytest.raises(InvalidInput, match="\nhint: "):
            Settings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        _ = Settings(database="mysql://x/y").database_url
    assert Settings(database="postgresql://u@h/d").database_url == "postgresql+psycopg://u@h/d"
