"""ONNX -> TensorRT plan, through the builder's Python API. Plans are always strongly typed: they keep the graph's precision."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan3d_client import contract

from .engines import targets
from .engines.log import log_of
from .engines.memory import plan_memory
from .engines.progress import watched
from .engines.structure import structure_digest
from .engines.targets import Target
from .files import ONNX_FILE, atomic_folder, atomic_path, separate
from .graphs import Axes, read_spec
from .manifest import Manifest, code_digest, file_digests, reusable, versions_of
from .networks import artifacts_of, network_of, remake

if TYPE_CHECKING:
    import tensorrt

_PROFILE_HINT = "hint: --profile latents=1..3072..4096"
_OTHER_FORM = {"op": "decomposed", "decomposed": "op"}

logger = logging.getLogger(__name__)


class BuildError(ValueError):
    """TensorRT refused the graph or the options."""


class BuildCancelled(RuntimeError):
    """The build was stopped by Ctrl-C; nothing was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """profile: (min, opt, max) of some axes, which replace the ranges that the weights are served with. optimization_level: the builder's level,
    0 to 5. workspace_bytes: the limit of the builder's workspace; None lets it use all memory.

    version_compatible: later versions of the library can run the plan too.
    hardware_compatible: other GPUs of the Ampere generation and later can run the plan too (target tensorrt).
    weight_stripped: the plan holds no weights; refit adds the weights of any checkpoint of the same network.
    timing_cache: the folder of the timing caches, which has a file for each target, library version and GPU.
    """

    profile: Axes | None = None
    optimization_level: int = 3
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_stripped: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization level must be in 0..5, got {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ValueError(f"workspace must be at least 1 byte, got {self.workspace_bytes}")
        if self.profile is not None and not (self.profile and set(self.profile) <= set(contract.AXES)):
            named = ", ".join(self.profile) or "nothing"
            raise ValueError(f"profile must name axes out of {', '.join(contract.AXES)}, got {named}")


def parse_profile(texts: list[str]) -> dict[str, contract.AxisRange]:
    """The ranges of axes that `texts` name. Each text looks like latents=1..3072..4096.

    Raises ValueError for an unknown axis, a range that is not min..opt..max, or a range beyond the sizes that graphs are traced
    for.
    """
    axes = {name: axis for axis, name in contract.AXIS_NAMES.items()}
    profile = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        if name not in axes:
            raise ValueError(f"profile axis must be one of {', '.join(axes)}, got {name!r}\n{_PROFILE_HINT}")
        try:
            low, opt, high = (int(size) for size in sizes.split(".."))
        except ValueError as error:
            raise ValueError(f"profile range must be min..opt..max, got {sizes!r}\n{_PROFILE_HINT}") from error
        largest = contract.AXES[axes[name]].max
        if high > largest:
            raise ValueError(f"profile of {name} must stay within the graph's {largest}, got {high}")
        profile[axes[name]] = contract.AxisRange(low, opt, high)
    return profile


def build_engines(
    onnx: Path, out: Path, target: Target, options: EngineOptions | None = None, *, networks: Collection[str] = ()
) -> list[Path]:
    """Builds a plan for every ONNX artifact below `onnx` into `out`/<Triton model name>/. Returns the folders.

    networks: build only the plans of these. A plan whose manifest still matches is kept. A new plan appears whole or not at all.

    Raises ManifestError for damaged artifacts, ValueError when `out` is the folder of the graphs, BuildError when TensorRT
    refuses a graph, BuildCancelled after Ctrl-C.
    """
    options = options or EngineOptions()
    _check_for_target(options, target)
    folders = []
    for folder, manifest in artifacts_of(networks, onnx, hint=remake).items():
        destination = separate(out / manifest.model, folder)
        spec, axes = _spec_and_axes(manifest, options)
        made_from = _made_from(folder, manifest, target, options=options, axes=axes)
        if reusable(destination, made_from):
            logger.info("%s: unchanged, kept", destination)
        else:
            with atomic_folder(destination) as temporary:
                job = _Job(folder / ONNX_FILE, manifest, spec, axes, target, options)
                tensors = _build_one(job, temporary / target.plan_file)
                memory = _memory(job, temporary / target.plan_file)
                _write_manifest(temporary, manifest, made_from, target, {"tensors": tensors, "memory": memory})
        folders.append(destination)
    return folders


def _check_for_target(options: EngineOptions, target: Target) -> None:
    """Raises ValueError for options that TensorRT for RTX lacks; its GPUs are named by --compute-capability."""
    if target.name == "tensorrt-rtx":
        if options.timing_cache is not None:
            raise ValueError("timing cache must be left out for tensorrt-rtx, which times nothing while building, got one")
        if options.hardware_compatible:
            raise ValueError(
                "hardware_compatible must be False for tensorrt-rtx, got True\nhint: --compute-capability names its GPUs"
            )


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that the build of one plan needs: the graph, the ranges of its axes, the library and the options."""

    onnx: Path
    manifest: Manifest
    spec: contract.ModelSpec
    axes: Axes
    target: Target
    options: EngineOptions


def _spec_and_axes(manifest: Manifest, options: EngineOptions) -> tuple[contract.ModelSpec, Axes]:
    """The graph's tensors, and the range of each axis: the options' range where they name one, else the range that the weights
    are served with, else the traced range.

    Raises ValueError for a range beyond the traced one.
    """
    spec, traced = read_spec(manifest.model, manifest.made_from["spec"])
    network = network_of(manifest.model)
    wanted = {**network.plan_profile(network.serving(manifest)), **(options.profile or {})}
    axes = {axis: wanted.get(axis, size) for axis, size in traced.items()}
    for axis, size in axes.items():
        if size.min < traced[axis].min or size.max > traced[axis].max:
            found = f"{size.min} to {size.max}"
            raise ValueError(
                f"profile of {axis} must stay within {traced[axis].min} to {traced[axis].max} of {manifest.model}, got {found}"
            )
    return spec, axes


def _made_from(folder: Path, manifest: Manifest, target: Target, *, options: EngineOptions, axes: Axes) -> dict[str, Any]:
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if key not in ("timing_cache", "profile")}
    # A stripped plan is not tied to any weights, so its identity leaves them out.
    weights = (None, None) if options.weight_stripped else (manifest.made_from["weights"], dict(manifest.files))
    return {
        "weights": weights[0],
        "onnx": weights[1],
        "structure": structure_digest(folder / ONNX_FILE),
        "precision": manifest.made_from["precision"],
        "attention": manifest.made_from["attention"],
        "options": manifest.made_from.get("options", {}),
        "target": target.name,
        "library_version": target.version,
        "compute_capabilities": list(target.compute_capabilities),
        "gpu": target.gpu.name if target.gpu else None,
        "profile": {axis: [size.min, size.opt, size.max] for axis, size in axes.items()},
        "code": code_digest([Path(__file__), Path(targets.__file__)]),
        **chosen,
    }


def _memory(job: _Job, plan: Path) -> dict[str, Any]:
    """The PlanMemory of a plan. One for TensorRT for RTX is not loaded, because it may be for other GPUs than this machine's."""
    library = job.target.library if job.target.gpu else None
    return dataclasses.asdict(plan_memory(plan, job.onnx, {axis: size.max for axis, size in job.axes.items()}, library))


def _write_manifest(folder: Path, onnx: Manifest, made_from: dict[str, Any], target: Target, found: dict[str, Any]) -> None:
    """found: the manifest's `tensors` and `memory`."""
    Manifest(
        model=onnx.model,
        made_from=made_from,
        serving=onnx.serving,
        versions={target.name: target.version, **versions_of("onnx", "torch")},
        files=file_digests(folder),
        **found,
    ).write(folder)


def _build_one(job: _Job, destination: Path) -> dict[str, Any]:
    """Writes the plan. Returns its tensors for the manifest, because a plan cannot be read without a GPU."""
    trt, manifest = job.target.library, job.manifest
    start = time.monotonic()
    log = log_of(trt)
    builder = trt.Builder(log.logger)
    # TensorRT 10 needs the flag. In TensorRT 11 every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(job.onnx)):
        problems = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(_refusal("parse", manifest, problems, job.options))
    config, profile = _config(builder, network, job)
    with _timing_cache(config, job.target, job.options), watched(trt, manifest.model) as watch:
        config.progress_monitor = watch.monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        if watch.cancelled:
            raise BuildCancelled(f"{manifest.model}: build cancelled, nothing written")
        raise BuildError(_refusal("build", manifest, log.errors, job.options))
    destination.write_bytes(memoryview(plan))
    facts = (manifest.model, job.target.name, job.target.version, plan.nbytes / 1e6, time.monotonic() - start)
    logger.info("%s: %s %s plan, %.0f MB, %.1f s", *facts)
    return _tensors(network, profile)


def _refusal(step: str, manifest: Manifest, problems: list[str], options: EngineOptions) -> str:
    reasons = "\n  ".join(problems[:5]) or "no reason given"
    hint = f"try the other form of attention: hunyuan3d-export onnx --attention {_OTHER_FORM[manifest.made_from['attention']]}"
    if options.weight_stripped and step == "build":
        hint = "a plan whose weights can be exchanged compiles only on a GPU, for every target: build there, or leave out --weight-stripped"
    return f"{manifest.model}: TensorRT must {step} the graph, got:\n  {reasons}\nhint: {hint}"


def _config(
    builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, job: _Job
) -> tuple[tensorrt.IBuilderConfig, tensorrt.IOptimizationProfile]:
    trt, options = job.target.library, job.options
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.weight_stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)  # without REFIT, the plan accepts only its original weights
    job.target.configure(config)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *(trt.Dims(list(shape)) for shape in _profile_shapes(job, tensor.name)))
    config.add_optimization_profile(profile)
    return config, profile


def _tensors(network: tensorrt.INetworkDefinition, profile: tensorrt.IOptimizationProfile) -> dict[str, Any]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found = {tensor.name: {"dtype": tensor.dtype.name, "shape": _sizes(tensor.shape)} for tensor in (*inputs, *outputs)}
    for tensor in inputs:
        found[tensor.name]["profile"] = [_sizes(shape) for shape in profile.get_shape(tensor.name)]
    return found


def _sizes(shape: tensorrt.Dims) -> list[int]:
    return [shape[axis] for axis in range(len(shape))]


def _profile_shapes(job: _Job, name: str) -> list[tuple[int, ...]]:
    """The input's min, opt and max shapes."""
    tensor = job.spec.input(name)
    return [tensor.shape({axis: getattr(size, kind) for axis, size in job.axes.items()}) for kind in ("min", "opt", "max")]


@contextlib.contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, target: Target, options: EngineOptions) -> Iterator[None]:
    if options.timing_cache is None:
        yield
        return
    gpu = target.gpu.name.replace(" ", "-") if target.gpu else "-".join(target.compute_capabilities)
    path = options.timing_cache / f"{target.name}-{target.version}-{gpu}.timing"
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    with atomic_path(path) as temporary:
        temporary.write_bytes(memoryview(cache.serialize()))
