"""The driver between the surface follower and the served field: waves, calls, cancelling and errors, without Triton."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cleaning
import decoding
import failures
import mesh_files
import numpy as np
import outcomes
import pytest
import surface
import trimesh

sys.path.insert(0, str(Path(__file__).parent))

from decoding_doubles import FieldNetworks, Recorder, decoded, settings, sphere

from hunyuan3d_client import contract


def alone(resolution: int) -> tuple[cleaning.Cleaned, surface.Surface]:
    """The mesh of the sphere by the follower alone, driven by a plain loop."""
    waves = surface.extract(resolution)
    values = None
    while True:
        try:
            values = sphere(next(waves) if values is None else waves.send(values))
        except StopIteration as end:
            found = end.value
            return cleaning.clean(found.vertices, found.faces), found


def test_the_file_is_that_of_the_follower_alone() -> None:
    sink = Recorder()
    found = decoded(FieldNetworks(), sink=sink)
    cleaned, expected = alone(24)
    assert found.format == "ply" and found.data == mesh_files.encode(cleaned.vertices, cleaned.faces, "ply")
    facts = json.loads(json.dumps(found.statistics))
    counts = {"vertices": len(cleaned.vertices), "faces": len(cleaned.faces), "components": 1, "watertight": True}
    assert facts.items() >= {**counts, "resolution": 24, "waves": sink.waves, "evaluations": sink.points}.items()
    assert facts["evaluations"] == expected.statistics.evaluations
    assert facts["seconds"].keys() == set(decoding.PARTS) and facts["seconds"]["field"] > 0
    mesh = trimesh.load_mesh(io.BytesIO(found.data), file_type="ply")
    assert mesh.is_watertight and abs(mesh.volume - 4 / 3 * np.pi * 0.7**3) < 0.03


def test_calls_are_padded_to_a_bucket_and_only_so_many_run() -> None:
    networks = FieldNetworks()
    decoded(networks, resolution=40)
    assert set(networks.sizes) <= set(contract.POINT_BUCKETS) == set(decoding.POINT_BUCKETS)
    assert networks.most_running == 2 and networks.sizes.count(contract.POINT_BUCKETS[-1]) > 2


@pytest.mark.parametrize(("count", "bucket"), [(1, 256), (256, 256), (257, 1024), (1025, 4096), (4096, 4096)])
def test_padding_repeats_the_last_point(count: int, bucket: int) -> None:
    queries = np.random.default_rng(0).uniform(-1, 1, (count, 3)).astype(np.float32)
    found = decoding.padded(queries)
    assert found.shape == (bucket, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:count], queries)
    assert (found[count:] == queries[-1]).all()


def test_several_decodes_share_the_calls_and_keep_their_own_results() -> None:
    radii = {"a": 0.3, "b": 0.5, "c": 0.7}
    networks = {name: FieldNetworks(lambda points, radius=radius: sphere(points, radius)) for name, radius in radii.items()}
    chosen = settings(resolution=64)
    running, full = 0, asyncio.Event()

    class Shared(FieldNetworks):
        async def field(self, queries: np.ndarray, keys_values: str, request_id: str) -> np.ndarray:
            nonlocal running
            running += 1
            assert running <= chosen.field_calls, "field_calls bounds the calls of all decodes together"
            if running == chosen.field_calls:
                full.set()
            await asyncio.wait_for(full.wait(), 30)  # the first calls wait for as many as may run
            try:
                return await networks[request_id].field(queries, keys_values, request_id)
            finally:
                running -= 1

    async def main() -> list[decoding.MeshFile]:
        sinks = [Recorder(name) for name in radii]
        decoder = decoding.Decoder(Shared(), chosen, Recorder())
        latents = np.zeros((1, 5, 64), np.float32)
        return await asyncio.gather(*(decoder.decode(latents, chosen.defaults, sink, lambda: None) for sink in sinks))

    for mesh, radius in zip(asyncio.run(main()), radii.values(), strict=True):
        vertices = trimesh.load_mesh(io.BytesIO(mesh.data), file_type="ply").vertices
        np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), radius, atol=0.01)
    assert full.is_set(), "decodes use what field_calls allows"


def test_progress_goes_through_all_stages() -> None:
    sink = Recorder()
    decoded(FieldNetworks(), sink=sink, resolution=100)
    stages = [each.stage for each in sink.stages]
    assert stages[0] == "keys and values" and stages[-1] == "file" and set(stages[1:-1]) == {"field"}
    waves = sink.stages[1:-1]
    assert len(waves) == sink.waves and waves[0].refinement == 0 and waves[-1].refinement == waves[-1].refinements - 1 >= 1
    counts = [each.evaluations for each in waves]
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1] < sink.points


@pytest.mark.parametrize("stop_at", [1, 5])
def test_no_call_begins_after_the_client_has_gone(stop_at: int) -> None:
    networks, gone = FieldNetworks(), []
    networks.at[stop_at] = lambda: gone.append(True)

    def check() -> None:
        if gone:
            raise outcomes.Cancelled("the client cancelled")

    with pytest.raises(outcomes.Cancelled):
        decoded(networks, check=check, resolution=64)
    assert len(networks.sizes) <= stop_at + 1, "only the call that was in flight beside"
    assert networks.running == 0


def test_a_failed_call_ends_its_decode_and_not_its_neighbours() -> None:
    class Failing(FieldNetworks):
        async def field(self, queries: np.ndarray, keys_values: str, request_id: str) -> np.ndarray:
            values = await super().field(queries, keys_values, request_id)
            if request_id == "bad" and self.request_ids.count("bad") >= 3:
                raise outcomes.Ended("hunyuan3d_field must answer, got nothing")
            return values

    async def main() -> list[object]:
        chosen = settings(resolution=64)
        networks = Failing()
        decoder = decoding.Decoder(networks, chosen, Recorder())
        latents = np.zeros((1, 5, 64), np.float32)
        calls = (decoder.decode(latents, chosen.defaults, Recorder(name), lambda: None) for name in ("bad", "good"))
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert networks.request_ids.count("bad") <= 4 < networks.request_ids.count("good")
        return found

    bad, good = asyncio.run(main())
    assert isinstance(bad, outcomes.Ended) and isinstance(good, decoding.MeshFile)


def holed(points: np.ndarray) -> np.ndarray:
    return np.where(points[:, 0] > 0.5, np.float32(np.nan), sphere(points))


@pytest.mark.parametrize(
    ("field", "limits", "kind", "code", "text"),
    [
        (holed, {}, outcomes.Ended, "INTERNAL", "NaN or infinite"),
        (lambda points: -np.ones(len(points), np.float32), {}, failures.EmptyField, "INVALID_ARG", "no surface"),
        (lambda points: np.ones(len(points), np.float32), {}, failures.FullField, "INVALID_ARG", "no surface"),
        (sphere, {"max_evaluations": 3000}, failures.TooManyEvaluations, "INVALID_ARG", "allowed 3000 evaluations"),
    ],
    ids=["NaN", "empty", "full", "too many"],
)
def test_a_field_without_a_surface_is_a_typed_error_with_a_hint(
    field: Callable[[np.ndarray], np.ndarray], limits: dict[str, int], kind: type[Exception], code: str, text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        decoded(FieldNetworks(field), **limits)
    assert outcomes.code(caught.value) == code and "\nhint: " in str(caught.value)


def test_a_defect_of_the_server_is_not_the_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise ValueError("index -20 is out of bounds")

    monkeypatch.setattr(mesh_files, "encode", broken)
    with pytest.raises(outcomes.Ended, match="The mesh could not be made: index -20") as caught:
        decoded(FieldNetworks())
    assert outcomes.code(caught.value) == "INTERNAL"


def test_a_decode_ends_in_time() -> None:
    with pytest.raises(outcomes.Expired, match=r"must end within 5 s.*\nhint: "):
        decoded(FieldNetworks(), check=decoding.until(time.monotonic() - 1, 5))
    decoded(FieldNetworks(), check=decoding.until(time.monotonic() + 60, 60))


def test_the_options_reach_the_follower_and_the_file() -> None:
    base = settings().defaults
    plain = decoded(FieldNetworks())
    changed = {"resolution": 30, "format": "obj", "max_faces": 100, "level": 0.5, "method": "dense"}
    for name, value in changed.items():
        found = decoded(FieldNetworks(), request=dataclasses.replace(base, **{name: value}))
        assert found.data != plain.data or found.statistics["waves"] < plain.statistics["waves"], name
        assert found.statistics[name] == value

    def specks(points: np.ndarray) -> np.ndarray:
        return np.maximum(sphere(points, 0.5), sphere(points - np.float32(0.8), 0.15))

    parts = [
        decoded(FieldNetworks(specks), request=dataclasses.replace(base, keep=keep)).statistics["components"]
        for keep in (0.0, 0.5)
    ]
    assert parts == [2, 1]
