"""The two TensorRT libraries behind one interface. Both have the same Builder and OnnxParser; this file has all differences."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, cast

from hunyuan3d_client.install import install_hint

from ..files import PLAN_FILE, RTX_PLAN_FILE
from . import server_image
from .api import TensorRT
from .gpu import Gpu, first_gpu

if TYPE_CHECKING:
    import tensorrt

# Target -> the modules to try, in order. The bindings of TensorRT for RTX are a wheel with a module name of its own.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
TARGETS = tuple(_MODULES)
# Target -> the name of its plans' file. A config serves plans of the target to which its file name belongs.
PLAN_FILES = {"tensorrt": PLAN_FILE, "tensorrt-rtx": RTX_PLAN_FILE}
DEFAULT_COMPUTE_CAPABILITIES = ("SM89", "SM120")


class TargetMissing(ValueError):
    """This machine lacks the library, or the GPU that the library needs."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A TensorRT library and the GPUs it builds for. gpu: this machine's GPU (tensorrt), or None (tensorrt-rtx)."""

    name: str
    library: TensorRT
    compute_capabilities: tuple[str, ...]
    gpu: Gpu | None

    @property
    def version(self) -> str:
        return str(self.library.__version__)

    @property
    def plan_file(self) -> str:
        """The name of the file that holds a plan of this target."""
        return PLAN_FILES[self.name]

    def configure(self, config: tensorrt.IBuilderConfig) -> None:
        """Sets the compute capabilities of a builder config. The target tensorrt has none: it builds for this machine's GPU."""
        if self.name != "tensorrt-rtx":
            return
        rtx_config: Any = config  # TensorRT lacks these attributes, and so do its stubs
        rtx_config.num_compute_capabilities = len(self.compute_capabilities)
        for index, name in enumerate(self.compute_capabilities):
            rtx_config.set_compute_capability(getattr(_compute_capabilities(self.library), name), index)


def find_target(name: str, compute_capabilities: tuple[str, ...] = ()) -> Target:
    """The target called `name`, ready to build.

    Raises ValueError for an unknown target or capability, TargetMissing when this machine lacks the library or its GPU.
    """
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    library = _import(name)
    if name == "tensorrt":
        return _tensorrt(library, compute_capabilities)
    known = [key for key in dir(_compute_capabilities(library)) if key.startswith("SM")]
    wanted = compute_capabilities or DEFAULT_COMPUTE_CAPABILITIES
    if unknown := [key for key in wanted if key not in known]:
        raise ValueError(f"compute capability must be one of {', '.join(known)}, got {', '.join(unknown)}")
    return Target(name, library, tuple(wanted), None)


def installed_version(name: str) -> str | None:
    """The version of a target's library on this machine; None when the library is not installed."""
    try:
        return str(_import(name).__version__)
    except TargetMissing:
        return None


def _compute_capabilities(library: Any) -> Any:
    return library.ComputeCapability


def _tensorrt(library: TensorRT, compute_capabilities: tuple[str, ...]) -> Target:
    gpu = first_gpu()
    if gpu is None:
        raise TargetMissing(f"target tensorrt must run on the GPU its plans are for, found no GPU\n{_TENSORRT_HINT}")
    if compute_capabilities and compute_capabilities != (gpu.compute_capability,):
        raise ValueError(
            f"compute capability must be this GPU's {gpu.compute_capability}, got {', '.join(compute_capabilities)}\n"
            "hint: leave it out; target tensorrt-rtx builds for others"
        )
    return Target("tensorrt", library, (gpu.compute_capability,), gpu)


_TENSORRT_HINT = (
    f"hint: on a GPU machine, in the image that will serve the plan: {server_image.BUILD}\n"
    "      make setup-gpu installs the same TensorRT into .venv, for make export-engine and make gpu-check"
)


def _import(name: str) -> TensorRT:
    for module in _MODULES[name]:
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(found, "Builder"):  # with only the type stubs installed, an empty module has this name
            return cast(TensorRT, found)
    if name == "tensorrt":
        raise TargetMissing(f"target tensorrt must have the package tensorrt, found none\n{_TENSORRT_HINT}")
    raise TargetMissing(
        f"target {name} must have the package tensorrt-rtx, found none\n"
        f"hint: {install_hint('export,rtx')}; it compiles without a GPU"
    )
