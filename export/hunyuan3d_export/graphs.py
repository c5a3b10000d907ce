"""The parts of an export: the source of the weights, a graph's tensors and free axes, and the options of writing a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from hunyuan3d_client import contract

from .precisions import check_precision

if TYPE_CHECKING:
    import onnx

ATTENTION_FORMS = ("op", "decomposed")

Axes = Mapping[str, contract.AxisRange]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How a graph is written. precision: fp32, fp16 or bf16, of weights and activations. attention: op or decomposed.

    choices: the values of options that the network itself declares (GraphOption); the others have their defaults.
    for_plans: the graph will be compiled to a plan, so the defaults for plans apply.
    """

    precision: str = "fp32"
    attention: str = "op"
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    for_plans: bool = False

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.attention not in ATTENTION_FORMS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_FORMS)}, got {self.attention!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphOption:
    """An option that only some networks have. values: those that it may have.

    for_plans: the default of a graph that becomes a plan; None takes `default`. graphs: the graphs that the option changes;
    None means all. halves_only: in an fp32 graph every value would give the same graph, so only the default is allowed.
    """

    values: tuple[str, ...]
    default: str
    for_plans: str | None = None
    graphs: tuple[str, ...] | None = None
    halves_only: bool = False

    def changes(self, graph: str) -> bool:
        return self.graphs is None or graph in self.graphs


def resolve(declared: Mapping[str, GraphOption], options: OnnxOptions, *, graphs: Iterable[str]) -> dict[str, str]:
    """The value of every option that a network declares: the chosen one, or else the default.

    Raises ValueError for an unknown option or value, and for a choice that would change none of `graphs`.
    """
    for name, value in options.choices.items():
        if name not in declared:
            raise ValueError(f"graph option must be one of {', '.join(declared) or 'none'}, got {name!r}")
        option = declared[name]
        if value not in option.values:
            raise ValueError(f"{name} must be one of {', '.join(option.values)}, got {value!r}")
        if not any(option.changes(graph) for graph in graphs):
            raise ValueError(f"{name} must be left out where it changes no graph, got {value} for {', '.join(graphs)}")
        if option.halves_only and options.precision == "fp32" and value != option.default:
            raise ValueError(f"{name} must be {option.default} in an fp32 graph, got {value}\nhint: --precision fp16")
    defaults = {
        name: option.for_plans if options.for_plans and option.for_plans else option.default
        for name, option in declared.items()
    }
    return {**defaults, **options.choices}


class Source(Protocol):
    """Where the weights of one network come from: a checkpoint, or seeded random numbers."""

    @property
    def network(self) -> str:
        """The network's name in NETWORKS."""

    @property
    def checkpoint(self) -> Path | None:
        """The file or folder that the user named; None for weights that are not read from a named file."""

    def identity(self) -> dict[str, Any]:
        """JSON that identifies the weights. Raises FileNotFoundError when their file is missing."""

    def serving(self) -> Any:
        """The dataclass of facts that deployment needs about these weights. Raises ValueError, CheckpointError."""

    def load(self, dtype: torch.dtype, *, attention_backend: str = "sdpa") -> nn.Module:
        """The network in this dtype, in eval mode on the CPU. Raises CheckpointError, ValueError."""


T = TypeVar("T")


def chosen_graph(available: Mapping[str, T], name: str) -> T:
    """The entry of this graph. Raises ValueError for an unknown graph."""
    if name not in available:
        raise ValueError(f"graph must be one of {', '.join(available)}, got {name!r}")
    return available[name]


def whole(network: nn.Module) -> nn.Module:
    """The network itself, whose forward is the graph."""
    return network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph of a network.

    spec: the tensors, where an axis that this export fixes is replaced by its size. axes: the range of each free axis. example:
    the sizes that the exporter traces with; none may be 0 or 1, because the exporter treats these as constants. module: turns
    the loaded network into the module whose forward is traced. ready: turns the loaded network into the graph itself, where the
    weights come as an ONNX graph; nothing is traced then, and `module` is what the graph is compared with.
    """

    spec: contract.ModelSpec
    axes: Axes
    example: Mapping[str, int]
    module: Callable[[Any], nn.Module] = whole
    ready: Callable[[Any], onnx.ModelProto] | None = None

    def described(self) -> dict[str, Any]:
        """The graph's tensors and axes as JSON for the manifest. A graph whose manifest holds other values is stale."""
        return {
            "inputs": [[tensor.name, tensor.dtype, list(tensor.dims)] for tensor in self.spec.inputs],
            "outputs": [[tensor.name, tensor.dtype, list(tensor.dims)] for tensor in self.spec.outputs],
            "axes": {axis: [size.min, size.opt, size.max] for axis, size in self.axes.items()},
        }


def read_spec(model: str, described: Mapping[str, Any]) -> tuple[contract.ModelSpec, Axes]:
    """The tensors of `model` and the range of each free axis, read from the JSON of Graph.described()."""

    def tensors(kind: str) -> tuple[contract.TensorSpec, ...]:
        return tuple(contract.TensorSpec(name, dtype, tuple(dims), "") for name, dtype, dims in described[kind])

    axes = {axis: contract.AxisRange(*sizes) for axis, sizes in described["axes"].items()}
    return contract.ModelSpec(model, tensors("inputs"), tensors("outputs")), axes
