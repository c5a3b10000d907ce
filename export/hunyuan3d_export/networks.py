"""The table of networks. The export, the parity checks and the deployment read all facts about a network from its row here,
so their code mentions no network by name. To add a network, write a folder beside dit/ and conditioner/, a row in this table,
and rows in the client's contract.

`python -m hunyuan3d_export.networks` renders the configs in model_repository/. Run it after a change of the contract or a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from hunyuan3d_client import contract

from .background import network as background
from .background.weights import BackgroundServing
from .checks import Check, Profile
from .conditioner import network as conditioner
from .conditioner.weights import ConditionerServing
from .dit import PRESETS, Preset, save_checkpoint
from .dit import network as dit
from .dit.sizes import plan_profile
from .graphs import Axes, Graph, GraphOption, Source
from .manifest import Manifest, ManifestError, read_artifacts
from .runners import Runner
from .shapevae import PRESETS as SHAPEVAE_PRESETS
from .shapevae import ShapeVAEPreset
from .shapevae import network as shapevae
from .shapevae import save_checkpoint as save_shapevae

# This model's folder holds the Python code that serves the graphs of all networks; the folders of the other models link to it.
CODE_OF_GRAPHS = contract.DIT
_HERE = Path(__file__).parent
S = TypeVar("S")


class Checks(Protocol):
    """Compares the results of two runners for one artifact's model, at sizes within `profile` (an empty profile has no bounds).

    against: the end of each check's name; it says which runtime expected_by uses.
    """

    def __call__(
        self, manifest: Manifest, found_by: Runner, expected_by: Runner, *, profile: Profile, against: str
    ) -> Iterator[Check]: ...


def _as_loaded(network: nn.Module, _options: Mapping[str, str]) -> nn.Module:
    return network


def _unsaid(_serving: Any) -> str:
    return "sizes of its own"


def _no_facts(_serving: Any) -> dict[str, str]:
    return {}


def _as_traced(_serving: Any) -> Axes:
    return {}


def _unchanged(serving: S, _precision: str) -> S:
    return serving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(Generic[S]):
    """One network. S is its dataclass of the facts that deployment needs about weights; Manifest.serving holds an S as JSON.

    name: its key in NETWORKS. title: its name in messages. label: the name of given weights in messages. sizes: those of given weights, in words.
    models: the Triton models that serve its graphs; the folder of the first holds the checkpoint for the torch runtime.
    command: the command that makes its ONNX artifacts. beside: the networks that must be deployed with it or before it.
    code, packages: the source files and distributions that determine its graphs; a change makes artifacts stale.
    attention_forms: form of attention in a graph -> the backend whose trace has this form.
    options: the options of its graphs that other networks lack. prepare: the loaded network and the value of each of these
    options -> the network that is traced.
    read_serving: Manifest.serving -> S. in_precision: the facts for weights in this precision, where they depend on it.
    graphs: name -> graph, for given weights.
    weights_of: the source of an artifact's weights, found from its manifest and the source that the user named.
    checks: the comparisons that `verify` runs. configs: path in the repository -> text of a config file.
    facts: path in the repository -> text of a file that each deployment writes anew.
    plan_sizes: the sizes of each axis that a plan must accept. plan_profile: the ranges of the axes that a plan is built for, where
    they are narrower than the graph's. base: the weights whose configs are in git.
    save: writes the checkpoint of the torch runtime; None for a network without a torch runtime.
    """

    name: str
    title: str
    models: tuple[str, ...]
    command: str
    beside: tuple[str, ...] = ()
    code: tuple[Path, ...]
    packages: tuple[str, ...] = ()
    attention_forms: Mapping[str, str]
    options: Mapping[str, GraphOption] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Any, Mapping[str, str]], nn.Module] = _as_loaded
    read_serving: Callable[[Mapping[str, Any]], S]
    label: Callable[[S], str]
    sizes: Callable[[S], str] = _unsaid
    graphs: Callable[[S], Mapping[str, Graph]]
    weights_of: Callable[[Manifest, Source | None], Source]
    checks: Checks
    configs: Callable[..., dict[str, str]]
    facts: Callable[[S], dict[str, str]] = _no_facts
    in_precision: Callable[[S, str], S] = _unchanged
    plan_sizes: Callable[[S], Mapping[str, tuple[int, ...]]]
    plan_profile: Callable[[S], Axes] = _as_traced
    base: S
    save: Callable[..., None] | None = None

    def serving(self, manifest: Manifest) -> S:
        """The facts that deployment needs about an artifact. Raises ManifestError when its manifest does not hold them."""
        try:
            return self.read_serving(manifest.serving)
        except (TypeError, KeyError, ValueError) as error:
            raise ManifestError(
                f"the manifest of {manifest.model} must say what a {self.title} is served with, got: {error!r}\n"
                f"hint: make it again with: {self.command}"
            ) from error

    def graph_of(self, serving: S, model: str) -> Graph:
        """The graph behind a Triton model."""
        return next(graph for graph in self.graphs(serving).values() if graph.spec.name == model)


def _sources(*folders: str) -> tuple[Path, ...]:
    return tuple(path for folder in folders for path in sorted((_HERE / folder).glob("*.py")))


NETWORKS: dict[str, Network[Any]] = {
    "dit": Network[Preset](
        name="dit",
        title="denoiser",
        models=(contract.DIT, contract.DIT_GUIDED),
        command="hunyuan3d-export onnx",
        code=_sources("dit", "attention"),
        attention_forms=dit.ATTENTION_FORMS,
        options=dit.OPTIONS,
        prepare=dit.prepare,
        read_serving=dit.preset_from_json,
        label=dit.label,
        sizes=dit.sizes,
        graphs=dit.graphs,
        weights_of=dit.weights_of,
        checks=dit.checks,
        configs=dit.config_files,
        facts=dit.facts,
        plan_sizes=dit.plan_sizes,
        plan_profile=plan_profile,
        base=PRESETS["v2-0"],
        save=save_checkpoint,
    ),
    "conditioner": Network[ConditionerServing](
        name="conditioner",
        title="image encoder",
        models=(contract.CONDITIONER,),
        command="hunyuan3d-export conditioner",
        beside=("dit",),
        code=_sources("conditioner"),
        packages=("transformers",),
        attention_forms=conditioner.ATTENTION_FORMS,
        read_serving=conditioner.serving_from_json,
        label=lambda _serving: "the image encoder",
        sizes=lambda serving: f"pictures of {serving.image_size} pixels, views: {serving.views}",
        graphs=conditioner.graphs,
        weights_of=conditioner.weights_of,
        checks=conditioner.checks,
        configs=conditioner.config_files,
        plan_sizes=conditioner.plan_sizes,
        base=ConditionerServing(),
    ),
    # Not `beside` a denoiser: nothing that is deployed with it depends on one, and latents may come from another server.
    "vae": Network[ShapeVAEPreset](
        name="vae",
        title="shape decoder",
        models=(contract.VAE, contract.FIELD),
        command="hunyuan3d-export vae",
        code=_sources("shapevae", "attention"),
        attention_forms=shapevae.ATTENTION_FORMS,
        read_serving=shapevae.preset_from_json,
        in_precision=shapevae.in_precision,
        label=lambda preset: f"the shape decoder of {preset.name}",
        sizes=shapevae.sizes,
        graphs=shapevae.graphs,
        weights_of=shapevae.weights_of,
        checks=shapevae.checks,
        configs=shapevae.config_files,
        plan_sizes=shapevae.plan_sizes,
        base=SHAPEVAE_PRESETS["v2-0"],
        save=save_shapevae,
    ),
    # Preprocessing, which comes with the image encoder, is the only caller.
    "background": Network[BackgroundServing](
        name="background",
        title="background remover",
        models=(contract.BACKGROUND,),
        command="hunyuan3d-export background",
        beside=("conditioner",),
        code=_sources("background"),
        packages=("onnxruntime",),
        attention_forms=background.ATTENTION_FORMS,
        read_serving=background.serving_from_json,
        label=lambda serving: f"the background remover {serving.name}",
        sizes=lambda serving: f"{serving.name}, pictures of {serving.side} pixels",
        graphs=background.graphs,
        weights_of=background.weights_of,
        checks=background.checks,
        configs=background.config_files,
        plan_sizes=background.plan_sizes,
        base=BackgroundServing(),
    ),
}


def network_of(model: str) -> Network[Any]:
    """The network whose graph `model` serves. Raises ManifestError when no network has this model."""
    for network in NETWORKS.values():
        if model in network.models:
            return network
    known = ", ".join(model for network in NETWORKS.values() for model in network.models)
    raise ManifestError(f"model must be one of {known}, got {model}\nhint: use the version of hunyuan3d-export that made it")


def check_names(networks: Iterable[str]) -> None:
    """Raises ValueError for a name that is no network's."""
    for name in networks:
        if name not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")


def artifacts_of(networks: Collection[str], folder: Path, *, hint: str | Callable[[str], str]) -> dict[Path, Manifest]:
    """The artifacts below `folder` (see read_artifacts) of these networks; of every network when `networks` is empty.

    Raises ValueError for an unknown network, ManifestError when there is none of them.
    """
    check_names(networks)
    found = read_artifacts(folder, hint=hint)
    chosen = {path: each for path, each in found.items() if not networks or network_of(each.model).name in networks}
    if not chosen:
        names = ", ".join(NETWORKS[name].title for name in networks)
        models = ", ".join(each.model for each in found.values())
        raise ManifestError(f"{folder} must hold artifacts of the {names}, found {models}\nhint: leave --network out")
    return chosen


def command_of(model: str) -> str:
    """The command that makes the ONNX artifact of `model`; for an unknown model, the command of the first network."""
    rows = [*NETWORKS.values()]
    return next((network for network in rows if model in network.models), rows[0]).command


def remake(model: str) -> str:
    """The hint for an ONNX artifact that cannot be used."""
    return f"export again with: {command_of(model)}"


if __name__ == "__main__":
    from .pbtxt import write_configs  # needs tritonclient, which a machine for gpu-check may lack

    for row in NETWORKS.values():
        write_configs(_HERE.parent.parent / "model_repository", row.configs(row.base))
