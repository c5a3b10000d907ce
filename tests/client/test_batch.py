"""Many pictures at once: names, ledger, resuming, shards, failures, and how many are in flight."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

import hunyuan3d_client as h
from hunyuan3d_client import batch, contract
from hunyuan3d_client.batch_inputs import Item, Shard, items_of
from hunyuan3d_client.ledger import Entry, Ledger, entries
from hunyuan3d_client.transport import Tensors


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "more/c.webp", "notes.txt", ".hidden.png"):
        (folder / name).write_bytes(name.encode())
    return folder


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("ledger*.jsonl")) for line in path.read_text().splitlines()]


def sent(transport: h.MockTransport) -> list[bytes]:
    return [request.inputs["image"][0] for request in transport.requests if request.model == contract.IMAGE_CONTEXT]


def run(transport: h.MockTransport, pictures: Any, out: Path, **options: Any) -> h.Summary:
    with h.Client(transport=transport) as client:
        return client.generate_many(pictures, out=out, num_latents=9, **options)


def test_a_folder_becomes_files_and_a_ledger(pictures: Path, tmp_path: Path) -> None:
    transport, out = h.MockTransport(), tmp_path / "out"
    summary = run(transport, pictures, out, seed=5)
    assert (summary.total, summary.done, summary.skipped, summary.failed) == (3, 3, 0, {})
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.glb")} == {"a.glb", "b.glb", "more/c.glb"}
    with h.Client(transport=h.MockTransport()) as client:
        assert (out / "more" / "c.glb").read_bytes() == client.generate(b"c", num_latents=9).data
    for line in lines(out):
        assert line["options"] == {"seed": 5, "num_latents": 9} and line["error"] is None and line["seconds"] >= 0
        assert line["request_id"] in {request.request_id for request in transport.requests}


def test_a_second_run_skips_what_is_done(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(h.MockTransport(), pictures, out)
    (out / "a.glb").unlink()
    (pictures / "b.png").write_bytes(b"another picture")
    transport = h.MockTransport()
    summary = run(transport, pictures, out)
    assert (summary.done, summary.skipped) == (2, 1) and sorted(sent(transport)) == [b"a.JPG", b"another picture"]
    assert run(h.MockTransport(), pictures, out).skipped == 3
    assert run(h.MockTransport(), pictures, out, steps=2).done == 3, "other options"
    assert run(h.MockTransport(), pictures, out, steps=2, resume=False).done == 3


def test_latents_alone_need_no_shape_decoder(pictures: Path, tmp_path: Path) -> None:
    """Another format is another result: the latents are made although the meshes are there, and stay beside them."""
    out = tmp_path / "out"
    run(h.MockTransport(), pictures, out)
    models = [model for name, model in h.MockTransport().models.items() if name != contract.MESH]
    transport = h.MockTransport(models=models)
    assert run(transport, pictures, out, format="npy").done == 3
    assert np.load(out / "more" / "c.npy").shape == (1, 9, 64) and (out / "more" / "c.glb").exists()
    with pytest.raises(
        h.ModelNotReady, match="hint: deploy a shape decoder: hunyuan3d-export vae; for latents alone: format=npy"
    ):
        run(transport, pictures, tmp_path / "other")


def test_the_options_of_meshes_reach_the_server(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"image": "{pictures}/b.png", "resolution": 32}}')
    transport, out = h.MockTransport(), tmp_path / "out"
    run(transport, tmp_path / "list.jsonl", out, format="ply", max_faces=7, resolution=64)
    (asked,) = [request.inputs for request in transport.requests if request.model == contract.MESH]
    assert (asked["format"][0], asked["max_faces"][0], asked["resolution"][0]) == (b"ply", 7, 32)
    (line,) = lines(out)
    assert line["options"] == {"seed": 0, "num_latents": 9, "max_faces": 7, "resolution": 32} and line["output"] == "b.ply"


def failing_for(picture: bytes, status: grpc.StatusCode, times: int = 10**9) -> h.MockTransport:
    whole, left = h.MockTransport(), [times]

    def answer(request: h.Request) -> Iterable[Tensors]:
        if request.model == contract.IMAGE_CONTEXT and request.inputs["image"][0] == picture and left[0]:
            left[0] -= 1
            raise h.StatusError(status, "words")
        return whole._answer(request)

    return h.MockTransport(answer)


def test_failures_are_recorded_and_tried_again_by_the_next_run(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(failing_for(b"b.png", grpc.StatusCode.INTERNAL), pictures, out)
    assert summary.done == 2 and list(summary.failed) == ["b"] and summary.failed["b"].startswith("ModelFailed: ")
    (entry,) = [line for line in lines(out) if line["error"]]
    assert (entry["name"], entry["error"]["type"]) == ("b", "ModelFailed") and not (out / "b.glb").exists()
    assert run(h.MockTransport(), pictures, out).done == 1
    with pytest.raises(h.ModelFailed):
        run(failing_for(b"b.png", grpc.StatusCode.INTERNAL), pictures, out, resume=False, on_error="raise")


def test_an_unreadable_picture_fails_alone(tmp_path: Path) -> None:
    summary = run(h.MockTransport(), [b"picture", tmp_path / "missing.png"], tmp_path / "out")
    assert summary.done == 1 and "InvalidInput: image must be a readable file" in summary.failed["missing"]


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.usefixtures("quick")
def test_what_passes_is_tried_again(
    status: grpc.StatusCode, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hunyuan3d_client.batch._FIRST_PAUSE_S", 1e-3)
    summary = run(failing_for(b"b.png", status, times=7), pictures, tmp_path / "out")
    assert (summary.done, summary.failed) == (3, {})
    assert max(line["attempts"] for line in lines(tmp_path / "out")) > 1


class InFlight:
    """The pictures that are encoded and not yet sampled, at all servers: those two requests may go to different ones."""

    now = most = 0


class Counting(h.MockTransport):
    """Counts the pictures in flight."""

    def __init__(self, parameters: dict[str, str], count: InFlight | None = None) -> None:
        super().__init__()
        self.count = count or InFlight()
        sampler = self.models[contract.SAMPLER]
        self.models[contract.SAMPLER] = h.ModelInfo(sampler.name, "1", inputs=sampler.inputs, parameters=parameters)

    async def infer(self, request: h.Request, *, timeout_s: float) -> Any:
        self.count.now += request.model == contract.IMAGE_CONTEXT
        self.count.most = max(self.count.most, self.count.now)
        await asyncio.sleep(0.005)
        async for answer in super().infer(request, timeout_s=timeout_s):
            yield answer
        self.count.now -= request.model == contract.SAMPLER


@pytest.mark.parametrize(
    ("parameters", "servers", "concurrency", "expected"),
    [
        ({"max_batch": "2", "max_trajectories": "64"}, 1, None, 4),
        ({"max_batch": "2", "max_trajectories": "3"}, 1, None, 3),
        ({"max_batch": "1", "max_trajectories": "9"}, 2, None, 4),
        ({}, 1, None, 8),
        ({}, 1, 5, 5),
    ],
)
def test_what_is_in_flight_is_bounded(
    parameters: dict[str, str], servers: int, concurrency: int | None, expected: int, tmp_path: Path
) -> None:
    count = InFlight()
    transports = [Counting(parameters, count) for _ in range(servers)]
    transport = transports[0] if servers == 1 else h.RoundRobin(transports)
    with h.Client(transport=transport) as client:
        summary = client.generate_many([b"%d" % index for index in range(20)], out=tmp_path / "out", concurrency=concurrency)
    assert summary.done == 20 and expected / servers <= count.most <= expected


def test_a_cancelled_batch_resumes(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def main() -> None:
        async with h.AsyncClient(transport=Counting({})) as client:
            first = asyncio.Event()
            loop = asyncio.get_running_loop()
            task = asyncio.create_task(
                client.generate_many(pictures, out=out, concurrency=1, progress=lambda _: loop.call_soon_threadsafe(first.set))
            )
            await first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        done = [line for line in lines(out) if line["error"] is None]
        assert 1 <= len(done) < 3 and {path.stem for path in out.rglob("*.glb")} == {Path(line["name"]).name for line in done}

    asyncio.run(main())
    with h.Client(transport=h.MockTransport()) as client:
        summary = client.generate_many(pictures, out=out)
    assert summary.done + summary.skipped == 3 and summary.skipped >= 1


def test_what_is_being_written_reaches_the_ledger(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted Client cancels its call, and then every task of its loop."""
    out, begun, write = tmp_path / "out", threading.Event(), batch.write

    def slowly(path: Path, made: Any) -> None:
        begun.set()
        time.sleep(0.3)
        write(path, made)

    async def main() -> None:
        async with h.AsyncClient(transport=h.MockTransport()) as client:
            task = asyncio.create_task(client.generate_many(pictures, out=out, concurrency=3))
            assert await asyncio.to_thread(begun.wait, 20)
            for _ in range(3):
                for each in asyncio.all_tasks() - {asyncio.current_task()}:
                    each.cancel()
                await asyncio.sleep(0.02)
            with pytest.raises(asyncio.CancelledError):
                await task

    monkeypatch.setattr(batch, "write", slowly)
    asyncio.run(main())
    done = {line["output"] for line in lines(out)}
    assert done and done == {path.relative_to(out).as_posix() for path in out.rglob("*.glb")}


def test_a_slow_progress_callback_holds_nothing_up(pictures: Path, tmp_path: Path) -> None:
    released = threading.Event()
    with h.Client(transport=h.MockTransport()) as client:
        thread = threading.Thread(
            target=client.generate_many,
            args=(pictures,),
            kwargs={"out": tmp_path / "out", "progress": lambda _: released.wait(20)},
        )
        thread.start()
        assert client.generate(b"x", num_latents=3, timeout_s=5).faces == 0
        released.set()
        thread.join(20)


@pytest.mark.usefixtures("pictures")
def test_jsonl_has_options_and_views_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"image": "pictures/b.png", "seed": 7, "steps": 2},
        {"image": ["pictures/a.JPG", "pictures/b.png"], "name": "both/ab"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    transport = h.MockTransport()
    assert run(transport, tmp_path / "list.jsonl", tmp_path / "out", seed=1).done == 2
    assert (tmp_path / "out" / "pictures" / "b.glb").exists() and (tmp_path / "out" / "both" / "ab.glb").exists()
    seeds = {request.inputs["seed"][0] for request in transport.requests if request.model == contract.SAMPLER}
    assert seeds == {7, 1} and {len(r.inputs["image"]) for r in transport.requests if "image" in r.inputs} == {1, 2}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 of"),
        ('{"seed": 3}', "an object with `image`"),
        ('{"image": "a.png", "stepz": 3}', "of the keys image, name, steps"),
        ('{"image": "a.png", "steps": -3}', "steps must be an integer from 1"),
        ('{"image": "a.png", "max_faces": -3}', "line 1 of .*max_faces must be an integer"),
        ('{"image": "a.png", "name": "../a"}', "name must be a path inside"),
        ('{"image": "a.png"}\n{"image": "a.jpg"}', "names must be different"),
    ],
)
def test_wrong_lines_are_told_before_anything_is_sent(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(line)
    transport = h.MockTransport()
    with pytest.raises(h.InvalidInput, match=words):
        run(transport, tmp_path / "list.jsonl", tmp_path / "out")
    assert not transport.requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_error": "ignore"}, "on_error must be record or raise"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"steps": -3}, "steps must be"),
        ({"shard": "4/4"}, "shard must be I/N"),
        ({"format": "fbx"}, "format must be glb or obj or stl or ply or npy"),
        ({"format": "npy", "resolution": 32}, "format must be that of a mesh beside resolution"),
        ({"resolution": 4000}, "resolution must be an integer from 8 to 1024"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(h.InvalidInput, match=words):
        run(h.MockTransport(), pictures, tmp_path / "out", **options)


def test_globs_and_what_is_no_input(pictures: Path) -> None:
    assert [item.name for item in items_of(f"{pictures}/**/*.webp", {})] == ["more/c"]
    assert [item.name for item in items_of(pictures / "b.png", {})] == ["b"]
    for wrong in (f"{pictures}/*.gif", pictures / "missing", [], 7):
        with pytest.raises(h.InvalidInput, match="pictures must be"):
            items_of(wrong, {})


def test_shards_are_parts_of_the_whole(tmp_path: Path) -> None:
    given = [tmp_path / f"{index}.png" for index in range(40)]
    for path in given:
        path.write_bytes(path.name.encode())
    sums = [run(h.MockTransport(), given, tmp_path / "out", shard=f"{index}/4") for index in range(4)]
    assert sum(each.done for each in sums) == 40 and all(each.done for each in sums)
    assert len(list((tmp_path / "out").glob("*.glb"))) == len(lines(tmp_path / "out")) == 40
    assert len(list((tmp_path / "out").glob("ledger-*-of-4.jsonl"))) == 4
    assert run(h.MockTransport(), given, tmp_path / "out").skipped == 40, "a run of the whole reads the ledgers of all shards"


def test_the_shard_of_an_indexed_job(root: Path) -> None:
    assert Shard.of("3", {"JOB_COMPLETION_INDEX": "2"}) == Shard(2, 3) == Shard.of("2/3", {})
    assert Shard.of(None, {}) == Shard(0, 1) and Shard.of("1", {"JOB_COMPLETION_INDEX": "0"}) == Shard()
    for text, environ in ((None, {"JOB_COMPLETION_INDEX": "0"}), ("3", {}), ("x", {}), ("2", {"JOB_COMPLETION_INDEX": "2"})):
        with pytest.raises(h.InvalidInput, match="shard must be"):
            Shard.of(text, environ)
    job = yaml.safe_load((root / "docker" / "kubernetes" / "batch-job.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    policy = yaml.safe_load((root / "docker" / "kubernetes" / "base" / "network-policy.yaml").read_text())
    (wanted,) = [
        peer["podSelector"]["matchLabels"]
        for rule in policy["spec"]["ingress"]
        for peer in rule.get("from", [])
        if "hunyuan3d-client" in peer.get("podSelector", {}).get("matchLabels", {})
    ]
    assert job["spec"]["template"]["metadata"]["labels"].items() >= wanted.items(), "the servers let these pods in"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    arguments = container["args"]
    assert arguments[arguments.index("--shard") + 1] == str(job["spec"]["completions"]), "all parts, and no part twice"


def entry(name: str, **fields: Any) -> Entry:
    given = {"output": f"{name}.glb", "digest": "d", "options": {}, "seconds": 1.0, "request_id": "i", "attempts": 1}
    return Entry(name, **{**given, **fields})


def test_a_ledger_survives_a_kill_within_a_line(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(entry("a"))
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"name": "b", "outp')
    with Ledger(tmp_path) as ledger:
        ledger.add(entry("c"))
        ledger.add(entry("a", error={"type": "ModelFailed", "message": "words"}))
    assert set(entries(tmp_path)) == {"a", "c"} and entries(tmp_path)["a"].error is None


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Ledger(tmp_path), Ledger(tmp_path, "0-of-2"), pytest.raises(h.InvalidInput, match="one run at a time"):
        Ledger(tmp_path).__enter__()


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".000000.glb.123.partial").touch()
    (out / ".other.glb.123.partial").touch()
    run(h.MockTransport(), [b"x"], out)
    assert {path.name for path in out.iterdir()} == {"000000.glb", "ledger.jsonl", ".other.glb.123.partial"}


def test_items_without_names_are_numbered() -> None:
    assert items_of([b"x", np.zeros((2, 2), np.uint8)], {})[1].name == "000001"
    assert Item("a", b"x").options == {}


def test_a_missing_output_folder(tmp_path: Path) -> None:
    with pytest.raises(h.InvalidInput, match="out must be in a folder that exists"):
        run(h.MockTransport(), [b"x"], tmp_path / "no" / "out")
