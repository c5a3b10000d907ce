"""Weight-stripped plan + ONNX artifact -> a plan with the artifact's weights, without a new build."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import ONNX_FILE, atomic_folder, separate
from ..manifest import Manifest, file_digests, read_artifacts, reusable, versions_of
from .log import log_of
from .runtime import load_engine
from .structure import structure_digest
from .targets import Target, find_target

REBUILD = "hunyuan3d-export engine --weight-stripped --onnx DIR --out DIR"
_EXPORT = "export them with: hunyuan3d-export onnx"

logger = logging.getLogger(__name__)


class RefitError(ValueError):
    """The plan cannot take these weights, or TensorRT refused them."""


def refit_plans(plans: Path, onnx: Path, out: Path) -> list[Path]:
    """Refits every weight-stripped plan below `plans` with the weights of its model below `onnx`.

    The refitted plans go to `out`/<Triton model name>/. A plan whose manifest still matches is kept. A new plan appears whole
    or not at all. Returns the folders.

    Raises ManifestError for damaged artifacts, RefitError for a plan that holds weights, was built by another version of its
    library or from another network, TargetMissing or PlanLoadError on a machine that cannot load the plan.
    """
    stripped = read_artifacts(plans, hint=f"build them with: {REBUILD}")
    sources = {manifest.model: (folder, manifest) for folder, manifest in read_artifacts(onnx, hint=_EXPORT).items()}
    for folder, plan in stripped.items():  # check all plans first, so that an error leaves nothing half done
        _check(folder, plan, sources)
    folders = []
    for folder, plan in stripped.items():
        target = _target(folder, plan)
        source, weights = sources[plan.model]
        destination = separate(out / plan.model, folder, source)
        made_from = _made_from(plan, weights)
        if reusable(destination, made_from):
            logger.info("%s: unchanged, kept", destination)
        else:
            with atomic_folder(destination) as temporary:
                plan_file = target.plan_file
                _refit(folder / plan_file, source / ONNX_FILE, temporary / plan_file, target)
                _write_manifest(temporary, plan, weights, made_from, target)
        folders.append(destination)
    return folders


def _check(folder: Path, plan: Manifest, sources: Mapping[str, tuple[Path, Manifest]]) -> None:
    if not plan.made_from.get("weight_stripped"):
        raise RefitError(f"{folder} must hold a weight-stripped plan, got none\nhint: {REBUILD}")
    if plan.model not in sources:
        raise RefitError(f"weights must be given for {plan.model}, found {', '.join(sources)}\nhint: {_EXPORT} --graph all")
    source, _ = sources[plan.model]
    if structure_digest(source / ONNX_FILE) != plan.made_from["structure"]:
        raise RefitError(
            f"{source} must be the network that {folder} was built from, got another size, precision, form of attention or exporter\n"
            f"hint: build a plan of its own: {REBUILD}"
        )


def _target(folder: Path, plan: Manifest) -> Target:
    target = find_target(plan.made_from["target"])
    wanted = plan.made_from["library_version"]
    if target.version != wanted:
        raise RefitError(
            f"{folder} must be refitted by {target.name} {wanted}, which built it, got {target.version}\nhint: {REBUILD}"
        )
    return target


def _made_from(plan: Manifest, weights: Manifest) -> dict[str, Any]:
    return {
        **plan.made_from,
        "weights": weights.made_from["weights"],
        "onnx": dict(weights.files),
        "weight_stripped": False,
        "refitted_from": dict(plan.files),
    }


def _write_manifest(folder: Path, plan: Manifest, weights: Manifest, made_from: dict[str, Any], target: Target) -> None:
    Manifest(
        model=plan.model,
        made_from=made_from,
        serving=weights.serving,  # sampling defaults belong to the weights, not to the stripped plan
        versions={target.name: target.version, **versions_of("onnx")},
        files=file_digests(folder),
        tensors=plan.tensors,
        memory=plan.memory,
    ).write(folder)


def _refit(plan: Path, onnx: Path, destination: Path, target: Target) -> None:
    trt = target.library
    start = time.monotonic()
    log = log_of(trt)
    engine = load_engine(plan, trt).engine
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    if not parser.refit_from_file(str(onnx)):
        problems = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RefitError(
            f"{plan} must take the weights of {onnx}, got:\n  {'; '.join(problems) or log.reasons()}\nhint: {REBUILD}"
        )
    if missing := refitter.get_missing_weights():
        raise RefitError(f"{onnx} must hold all weights of {plan}, missing {', '.join(missing[:5])}\nhint: {REBUILD}")
    if not refitter.refit_cuda_engine():
        raise RefitError(f"{plan} must take the weights of {onnx}, got:\n  {log.reasons()}\nhint: {REBUILD}")
    with_weights = engine.create_serialization_config()
    with_weights.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)  # a stripped engine sets this flag by default
    destination.write_bytes(memoryview(engine.serialize_with_config(with_weights)))
    logger.info("%s: refitted, %.0f MB, %.1f s", destination, destination.stat().st_size / 1e6, time.monotonic() - start)
