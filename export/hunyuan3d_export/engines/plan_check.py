"""Whether a plan can be served here: by the library of its target, on this machine's GPU."""

from __future__ import annotations

from pathlib import Path

from ..manifest import Manifest
from . import server_image
from .gpu import first_gpu
from .targets import PLAN_FILES, installed_version


class DeployError(ValueError):
    """The artifacts cannot be deployed into this repository, or cannot be served from it, as asked."""


def check_plan(manifest: Manifest, folder: Path) -> None:
    """Compares a plan with the library that will run it, which is that of the server's image or, for TensorRT for RTX, this
    machine's, and with this machine's GPU. An ONNX artifact passes. Where the machine has no GPU or no such library, that part
    of the comparison is left out.

    Raises DeployError, with the command that makes the right plan, for a plan that could not be served, and for a plan in the
    file of another target, because the file decides which configs serve it.
    """
    target = manifest.made_from.get("target")
    if target is None:
        return
    build = server_image.BUILD if target == "tensorrt" else f"hunyuan3d-export engine --target {target} --onnx DIR --out DIR"
    hint = f"hint: on the machine that will serve: {build}"
    if (wanted := PLAN_FILES.get(target)) not in manifest.files:
        raise DeployError(
            f"{folder} must hold its plan of target {target} as {wanted}, got {', '.join(manifest.files)}\n{hint}"
        )
    if manifest.made_from.get("weight_stripped"):
        raise DeployError(
            f"{folder} must hold a plan with weights, got a weight-stripped one\n"
            f"hint: hunyuan3d-export refit --plan DIR --onnx DIR --out DIR, then deploy that"
        )
    if problem := _library_problem(target, manifest):
        raise DeployError(f"{folder} {problem}\n{hint}")
    gpu, capabilities = first_gpu(), manifest.made_from["compute_capabilities"]
    if gpu is not None and gpu.compute_capability not in capabilities and not manifest.made_from["hardware_compatible"]:
        raise DeployError(
            f"{folder} must be built for this machine's {gpu.compute_capability} ({gpu.name}), got {', '.join(capabilities)}\n{hint}"
        )


def _library_problem(target: str, manifest: Manifest) -> str | None:
    """Why the library that will run a plan cannot: the TensorRT of the server's image, or this machine's TensorRT for RTX."""
    if target == "tensorrt":
        return server_image.refusal(manifest.made_from, server_image.tensorrt_version())
    # A plan of TensorRT for RTX runs only on the release that built it, whatever the builder was told.
    version, wanted = installed_version(target), manifest.made_from["library_version"]
    if version is None or version == wanted:
        return None
    return f"must be built by this machine's {target} {version}, got {wanted}"
