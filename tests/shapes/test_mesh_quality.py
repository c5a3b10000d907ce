"""The gate passes the shipped shape decoder, and fails for each plausible mistake in a decoder or in the making of meshes."""

import json
import threading

import numpy as np
import pytest
import torch
from mutants import MESH_MUTANTS

from hunyuan3d_export.dit import PRESETS, load_checkpoint
from hunyuan3d_export.files import sha256
from hunyuan3d_export.shapes import CHECKPOINT
from hunyuan3d_export.shapes.decoding import Decoder
from hunyuan3d_export.shapes.gate import torch_decoder
from hunyuan3d_export.shapes.mesh_quality import MeshQuality
from hunyuan3d_export.shapes.quality import QUICK_PROMPTS, draw, failures, load_thresholds
from hunyuan3d_export.shapes.reference import torch_sampler
from hunyuan3d_export.shapevae.weights import SHIPPED

SHAPES = PRESETS["shapes"]
RESOLUTION = 32
PROMPTS = (*QUICK_PROMPTS, "flat helix")
BOUNDS_OF = {"overall": {}, "probes": {}, "meshes": load_thresholds("quick")["meshes"]}


@pytest.fixture(scope="module")
def clouds():
    sample = torch_sampler(load_checkpoint(CHECKPOINT, dtype=torch.float32), steps=8, guidance="guided")
    sizes = {"num_latents": 128, "guidance_scale": SHAPES.guidance_scale}
    return {prompt: draw(sample, prompt, [0], **sizes) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def reference(clouds):
    """The sound meshes, made before a mutant changes the code."""
    decode = Decoder(torch_decoder(), RESOLUTION)
    known = {latents[0].tobytes(): decode(latents[0]) for latents in clouds.values()}
    return lambda latents: known[latents.tobytes()]


def report(clouds, decode, reference):
    meshes = MeshQuality(decode, seeds=1, reference=reference, cells=RESOLUTION)
    for prompt, latents in clouds.items():
        assert meshes.add(prompt, latents).startswith("meshes: to surface ")
    return {"overall": {}, "probes": {}, "meshes": meshes.report()}


def test_the_checkpoint_is_small_and_its_manifest_names_it():
    manifest = json.loads(SHIPPED["shapes"].with_suffix(".json").read_text())
    assert manifest["sha256"] == sha256(SHIPPED["shapes"])
    assert SHIPPED["shapes"].stat().st_size < 3_000_000
    assert "--seed 0" in manifest["command"]


def test_the_shipped_decoder_passes(clouds, reference):
    found = report(clouds, Decoder(torch_decoder(), RESOLUTION), reference)
    assert failures(found, BOUNDS_OF) == []
    assert found["meshes"]["overall"]["deviation"] == pytest.approx(0, abs=1e-9)
    assert set(found["meshes"]["prompts"]) == set(PROMPTS)


@pytest.mark.parametrize("mutant", MESH_MUTANTS)
def test_the_gate_fails_for(mutant, clouds, reference):
    with MESH_MUTANTS[mutant]():
        found = report(clouds, Decoder(torch_decoder(), RESOLUTION), reference)
    assert failures(found, BOUNDS_OF), found["meshes"]["overall"]


def test_a_path_without_a_surface_fails(clouds, reference):
    found = report(clouds, lambda _latents: None, reference)
    missed = failures(found, BOUNDS_OF)
    assert any("to_surface" in line for line in missed) and any("deviation" in line for line in missed)


def test_meshes_made_at_once_are_measured_in_order(clouds):
    latents = np.concatenate(list(clouds.values())[:2])
    decoded = threading.Barrier(2, timeout=60)  # breaks unless two are decoded at a time
    decode = Decoder(torch_decoder(), RESOLUTION)

    def both(each):
        decoded.wait()
        return decode(each)

    alone, together = MeshQuality(decode, seeds=2), MeshQuality(both, seeds=2, at_once=2)
    for meshes in (alone, together):
        meshes.add(PROMPTS[0], latents)
    assert together.report() == alone.report()


def test_clouds_that_are_not_finite_have_no_mesh():
    meshes = MeshQuality(lambda _latents: pytest.fail("decoded"), seeds=1)
    meshes.add("cube", np.full((1, 16, 64), np.nan, np.float32))
    assert meshes.report()["overall"]["watertight"] == 0
