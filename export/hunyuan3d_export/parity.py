"""Compares what ONNX Runtime or a plan computes with torch, and writes a receipt of the comparison beside each artifact."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hunyuan3d_client import contract

from .checks import Check, Profile
from .engines.gpu import first_gpu
from .engines.runtime import PlanLoadError
from .engines.targets import TargetMissing, find_target
from .files import atomic_path, sha256
from .graphs import Source
from .manifest import NAME as MANIFEST
from .manifest import Manifest, read_artifacts, versions_of
from .networks import Network, artifacts_of, network_of, remake
from .precisions import PRECISIONS
from .progress import ComparisonWatch, Silent
from .runners import DryRunner, OnnxRunner, PlanRunner, Runner, TorchRunner, WatchedRunner

RECEIPT = "parity.json"
_BUILD = "build them again with: hunyuan3d-export engine"
_NO_CPU_KERNELS = ("bf16",)  # precisions that ONNX Runtime cannot run on a CPU

logger = logging.getLogger(__name__)


# The source of an artifact's weights, or network -> source.
Given = Source | Mapping[str, Source] | None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """quick: make the first check of each model alone, and write no receipt. watch: is told how the checks go."""

    quick: bool = False
    watch: ComparisonWatch = dataclasses.field(default_factory=Silent)


def verify(
    artifacts: Path,
    weights: Given = None,
    *,
    networks: Collection[str] = (),
    run: RunOptions | None = None,
) -> dict[str, list[Check]]:
    """Compares every ONNX artifact below `artifacts` with torch and writes a receipt beside each manifest.

    weights: the source of the artifacts' weights; needed only for artifacts made from a checkpoint. networks: compare only the
    artifacts of these. Returns the checks of each model. A bf16 graph gets no checks, because ONNX Runtime cannot run it on a CPU.

    Raises ManifestError when an artifact is damaged or was made from other weights.
    """
    results: dict[str, list[Check]] = {}
    run = run or RunOptions()
    found = artifacts_of(networks, artifacts, hint=remake)
    runs = {folder: _Run(manifest, {}, "", run) for folder, manifest in found.items() if _on_a_cpu(manifest)}
    _plan(run.watch, runs.values())
    for folder, manifest in found.items():
        checks = []
        if folder in runs:
            run.watch.begin(f"{manifest.model}: loading")
            expected = _reference(network_of(manifest.model), manifest, weights)
            checks = list(runs[folder].checks(OnnxRunner(artifacts), expected))
            del expected
        else:
            logger.info("%s: not compared, because ONNX Runtime has no CPU kernels of this precision", manifest.model)
        results[manifest.model] = checks
        if not run.quick:
            run.watch.wrote(write_receipt(folder, manifest, checks))
        gc.collect()  # a full-size network takes gigabytes, so its memory must be free before the next network loads
    return results


def parse_at_most(texts: list[str]) -> dict[str, int]:
    """Axis -> the largest size to compare at. Each text looks like latents=512. Raises ValueError for any other text."""
    axes = {name: axis for axis, name in contract.AXIS_NAMES.items()}
    most = {}
    for text in texts:
        name, _, size = text.partition("=")
        if name not in axes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--at-most must be one of {', '.join(axes)}, = and a size, got {text!r}\nhint: --at-most latents=512"
            )
        most[axes[name]] = int(size)
    return most


def narrowed(profile: Profile, at_most: Mapping[str, int]) -> Profile:
    """The profile with smaller largest sizes, but no smaller than its smallest ones, which the plan needs."""
    return {axis: [min(size, max(sizes[0], at_most.get(axis, size))) for size in sizes] for axis, sizes in profile.items()}


def verify_engines(
    plans: Path,
    weights: Given = None,
    onnx: Path | None = None,
    *,
    at_most: Mapping[str, int] | None = None,
    networks: Collection[str] = (),
    run: RunOptions | None = None,
) -> dict[str, list[Check]]:
    """Compares every plan below `plans` with float32 torch on the GPU, and with the ONNX artifacts below `onnx` on the CPU.

    Writes a receipt beside each plan's manifest. weights, networks, run: as in verify. at_most: axis -> the largest size to
    compare at, for a slow machine. Returns the checks of each model.

    Raises ManifestError for damaged artifacts or other weights, PlanLoadError for a plan that this machine cannot load.
    """
    results = {}
    run = run or RunOptions()
    sources = read_artifacts(onnx, hint=remake) if onnx else {}
    found = artifacts_of(networks, plans, hint=_BUILD)
    runs = {}
    for folder, manifest in found.items():
        _check_loadable(folder, manifest, {source.model: source.files for source in sources.values()})
        profile = narrowed(manifest.made_from["profile"], at_most or {})
        ends = (", torch", *([", ONNX Runtime"] if onnx is not None and _on_a_cpu(manifest) else []))
        runs[folder] = [_Run(manifest, profile, end, run) for end in ends]
    _plan(run.watch, itertools.chain.from_iterable(runs.values()))
    for folder, manifest in found.items():
        run.watch.begin(f"{manifest.model}: loading")
        checks = list(_plan_checks(runs[folder], plans, weights, onnx))
        results[manifest.model] = checks
        if not run.quick:
            run.watch.wrote(write_receipt(folder, manifest, checks))
        gc.collect()
        torch.cuda.empty_cache()
    return results


def _plan_checks(runs: list[_Run], plans: Path, weights: Given, onnx: Path | None) -> Iterator[Check]:
    """The checks of one plan against torch and, if there is a second run, against ONNX Runtime."""
    manifest = runs[0].manifest
    engine = PlanRunner(plans, find_target(manifest.made_from["target"]))
    reference = _reference(network_of(manifest.model), manifest, weights, device="cuda")
    yield from runs[0].checks(engine, reference)
    del reference
    for further in runs[1:]:
        assert onnx is not None
        yield from further.checks(engine, OnnxRunner(onnx))


@dataclasses.dataclass(frozen=True)
class _Run:
    """The comparison of one artifact with one runtime. against: the end of each check's name, which says the runtime."""

    manifest: Manifest
    profile: Profile
    against: str
    options: RunOptions

    def _made(self, found_by: Runner, expected_by: Runner) -> Iterator[Check]:
        checks = network_of(self.manifest.model).checks(
            self.manifest, found_by, expected_by, profile=self.profile, against=self.against
        )
        return itertools.islice(checks, 1 if self.options.quick else None)

    def checks(self, found_by: Runner, expected_by: Runner) -> Iterator[Check]:
        watch = self.options.watch
        watch.begin(f"{self.manifest.model}{self.against}")
        for check in self._made(WatchedRunner(found_by, watch), WatchedRunner(expected_by, watch)):
            watch.finish(f"{self.manifest.model}: {check}")
            yield check

    def size(self) -> tuple[int, float]:
        """The number of checks, and the work of all their evaluations."""
        network = network_of(self.manifest.model)
        dry = DryRunner(network.graph_of(network.serving(self.manifest), self.manifest.model).spec)
        return sum(1 for _ in self._made(dry, dry)), dry.work


def _plan(watch: ComparisonWatch, runs: Iterable[_Run]) -> None:
    sizes = [run.size() for run in runs]
    watch.plan(sum(checks for checks, _ in sizes), sum(work for _, work in sizes))


def _on_a_cpu(manifest: Manifest) -> bool:
    """Whether ONNX Runtime can run the artifact's graph on a CPU."""
    return manifest.made_from["precision"] not in _NO_CPU_KERNELS


def _reference(network: Network[Any], manifest: Manifest, weights: Given, *, device: str = "cpu") -> Runner:
    """The artifact's network in float32 torch."""
    given = weights.get(network.name) if isinstance(weights, Mapping) else weights
    source = network.weights_of(manifest, given)
    return TorchRunner(source.load(PRECISIONS["fp32"]), network.graphs(network.serving(manifest)), device=device)


def why_skipped(plans: Path) -> str | None:
    """The reason, in one line, why this machine can run no plan below `plans`; None when it may be able to run them.

    Raises ManifestError for damaged artifacts.
    """
    manifests = read_artifacts(plans, hint=_BUILD)
    if first_gpu() is None:
        return "a plan runs on a GPU, and this machine has none"
    for manifest in manifests.values():
        try:
            find_target(manifest.made_from["target"])
        except TargetMissing as error:
            return str(error).splitlines()[0]
    return None


def _check_loadable(folder: Path, manifest: Manifest, sources: Mapping[str, Mapping[str, str]]) -> None:
    if manifest.made_from.get("weight_stripped"):
        raise PlanLoadError(
            f"{folder} must hold a plan with weights, got a weight-stripped one\n"
            "hint: hunyuan3d-export refit --plan DIR --onnx DIR --out DIR"
        )
    if sources and manifest.made_from["onnx"] not in sources.values():
        found = "another" if manifest.model in sources else "none of this model"
        raise PlanLoadError(
            f"{folder} must be compared with the ONNX artifact it was built from, got {found}\nhint: --artifacts DIR of that export"
        )


def write_receipt(folder: Path, manifest: Manifest, checks: list[Check]) -> Path:
    """Writes the checks beside the manifest, and returns the file. The manifest's digest in the receipt makes it valid for this artifact alone."""
    receipt = {
        "model": manifest.model,
        "manifest_sha256": sha256(folder / MANIFEST),
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
        "versions": {**manifest.versions, **versions_of("torch", "onnxruntime", "onnxruntime-gpu")},
    }
    with atomic_path(folder / RECEIPT) as temporary:
        temporary.write_text(json.dumps(receipt, indent=2) + "\n")
    return folder / RECEIPT


def receipt_problem(folder: Path) -> str | None:
    """What is wrong with the parity receipt in an artifact's folder; None when the artifact has passed its comparison."""
    path = folder / RECEIPT
    if not path.is_file():
        return "has no parity receipt"
    try:
        receipt = json.loads(path.read_text())
        if receipt["manifest_sha256"] != sha256(folder / MANIFEST):
            return "has the parity receipt of another artifact"
        failed = [check["name"] for check in receipt["checks"] if not check["passed"]]
    except (ValueError, TypeError, KeyError) as error:
        return f"has an unreadable parity receipt ({error!r})"
    if failed:
        return f"failed the comparison: {', '.join(failed)}"
    return None if receipt["checks"] else "was compared with nothing"
