"""The image encoder's row in the table of networks: its graph, the checks against torch, and its deployment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hunyuan3d_client import contract

from ..checks import Check, Profile, compare, within
from ..graphs import Graph, Source
from ..manifest import Manifest, ManifestError
from ..runners import Runner
from .weights import ConditionerServing, ConditionerSource

# Form of attention in the graph -> transformers' implementation whose trace has this form.
ATTENTION_FORMS = {"op": "sdpa", "decomposed": "eager"}
# Relative L2 error of the context. The context is float16, so two float32 results on either side of a rounding boundary differ
# by one part in 1024.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
_SEED = 2025


def serving_from_json(serving: Mapping[str, Any]) -> ConditionerServing:
    """The ConditionerServing that a manifest's `serving` holds."""
    return ConditionerServing(**serving)


def graphs(serving: ConditionerServing) -> dict[str, Graph]:
    """The one graph: the side of the picture is fixed in it, and for one view the number of views too."""
    fixed = {"side": serving.image_size} | ({"V": 1} if serving.views == 1 else {})
    spec = contract.MODELS[contract.CONDITIONER].sized(fixed)
    example = {"B": 2, "V": 3}
    return {"encoder": Graph(spec=spec, axes=spec.axes, example=example)}


def weights_of(manifest: Manifest, given: Source | None) -> ConditionerSource:
    """The weights that an artifact was made from: shipped or random weights, or those of the given checkpoint.

    Raises ManifestError when the given checkpoint is another one, or when none was given and the artifact needs one.
    """
    identity = manifest.made_from["weights"]
    named = {name: identity[name] for name in ("variant", "seed") if name in identity}
    path = None if named or given is None else given.checkpoint
    source = ConditionerSource(path=path, **named, **manifest.serving)
    found = source.identity() if named or path else "none"
    if found != identity:
        raise ManifestError(f"{manifest.model} must be checked with its own weights, got {found}\nhint: --checkpoint FILE")
    return source


def checks(manifest: Manifest, found_by: Runner, expected_by: Runner, *, profile: Profile, against: str) -> Iterator[Check]:
    """Two pictures of one view and, where the graph takes more, one of two views. They are few: each takes a CPU seconds."""
    serving, tolerance = serving_from_json(manifest.serving), TOLERANCES[manifest.made_from["precision"]]
    size = serving.image_size
    for wanted in ((2, 1), *([(1, 2)] if serving.views > 1 else [])):
        batch, views = within(profile, wanted, "BV")
        pixels = {"pixels": torch.randn(batch, views, 3, size, size, generator=torch.Generator().manual_seed(_SEED))}
        found, expected = (run.run(manifest.model, pixels)["context"] for run in (found_by, expected_by))
        name = f"{views} x {size} px{against}"
        yield compare(name, (batch, 0, found.shape[1]), found, expected, tolerance=tolerance)


def plan_sizes(serving: ConditionerServing) -> dict[str, tuple[int, ...]]:
    """The sizes of the batch and of the views that the configs let callers send."""
    views: dict[str, tuple[int, ...]] = {"V": (1, serving.views)} if serving.views > 1 else {}
    return {"B": (1, contract.AXES["B"].max), **views}


def config_files(serving: ConditionerServing) -> dict[str, str]:
    """See configs.config_files."""
    from .configs import config_files as render  # needs tritonclient, which a machine for gpu-check may lack

    return render(serving)
