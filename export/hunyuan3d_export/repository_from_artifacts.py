"""Artifacts, or a checkpoint -> a Triton model repository with configs that fit and files whose digests were checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .engines.plan_check import DeployError, check_plan
from .engines.targets import PLAN_FILES
from .files import CHECKPOINT_FILE, ONNX_FILE, VERSION, atomic_path, naming_a_full_disk, new_folders, sha256
from .graphs import Source
from .identity import warn_of_random
from .manifest import NAME as MANIFEST
from .manifest import Manifest, reusable, versions_of
from .networks import CODE_OF_GRAPHS, NETWORKS, Network, artifacts_of, command_of, network_of, remake
from .parity import receipt_problem
from .pbtxt import same_but_for_warmup
from .precisions import PRECISIONS, check_precision

_CHECKOUT = Path(__file__).parent.parent.parent / "model_repository"
# The repository that is copied: the one in git or, in an installation without a checkout, the one inside the package.
SOURCE = _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parent / "model_repository"
DEFAULT_REPOSITORY = _CHECKOUT if _CHECKOUT.is_dir() else Path("model_repository")
# "{}*" also matches the files of external weights, and ".{}*.partial" the files that a killed copy left.
_ARTIFACT_FILES = tuple(
    form.format(name)
    for name in (ONNX_FILE, *PLAN_FILES.values(), CHECKPOINT_FILE, MANIFEST)
    for form in ("{}*", ".{}*.partial")
)
_COPY = ".copy"  # how the name of a copy ends that has not replaced the deployed file yet
_DEPLOY_AGAIN = "deploy it again with: hunyuan3d-export deploy"

__all__ = ["DEFAULT_REPOSITORY", "SOURCE", "DeployError", "check_takes", "deploy", "deploy_checkpoint"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Deployed:
    """The artifacts of one network that are being deployed."""

    network: Network[Any]
    serving: Any
    manifests: Mapping[Path, Manifest]


def deploy(
    artifacts: Path, repository: Path = DEFAULT_REPOSITORY, *, require_parity: bool = False, networks: Collection[str] = ()
) -> list[str]:
    """Copies every artifact below `artifacts` into `repository`. Returns the names of the models that can now be served.

    The repository in git accepts only weights whose configs equal the configs in git; another folder becomes a copy of that
    repository with configs of its own. New artifacts replace all earlier artifacts of the same network; the artifacts of other
    networks stay. require_parity: refuse an artifact without a parity receipt that passed, instead of logging a warning. networks: deploy only the artifacts of these.

    Raises ManifestError for a folder without a matching manifest, DeployError when the repository cannot take the artifacts.
    """

    def hint(model: str) -> str:
        return f"make them again with: {command_of(model)} --out {artifacts}"

    manifests = artifacts_of(networks, artifacts, hint=hint)
    for folder, manifest in manifests.items():
        check_plan(manifest, folder)
        _check_parity(folder, manifest, required=require_parity)
    new = [_gathered(network, manifests) for network in NETWORKS.values() if _any_of(network, manifests)]
    for each in new:
        _check_profiles(each, each.serving)
    _check_beside(new, repository)
    configs = {each.network.name: each.network.configs(each.serving) for each in new}
    for each in new:
        _check_served(each, configs[each.network.name])
    _check_in_git(repository, new, configs)
    with _copied(manifests, repository) as copies, _all_or_nothing(repository, new):
        _prepare(repository, new, configs)
        for each in new:
            _remove_artifacts(repository, each.network)
        for copy, path in copies.items():
            copy.replace(path)
    for each in new:
        warn_of_random(each.manifests.values())
    return [manifest.model for manifest in manifests.values()]


def check_takes(sources: Iterable[Source], repository: Path, *, precision: str) -> None:
    """Raises DeployError when `repository` could not take the artifacts of these weights because its configs are in git.

    It spares the user an export that could not be deployed. Raises CheckpointError, ValueError for unreadable weights.
    """
    if not _is_in_git(repository):
        return
    rows = [(NETWORKS[source.network], source) for source in sources]
    new = [_Deployed(row, row.in_precision(source.serving(), precision), {}) for row, source in rows]
    _check_in_git(repository, new, {each.network.name: each.network.configs(each.serving) for each in new})


def deploy_checkpoint(
    weights: Source, repository: Path = DEFAULT_REPOSITORY, *, precision: str = "fp32", torch: Mapping[str, str] | None = None
) -> list[str]:
    """Writes a checkpoint of the weights into `repository`, for the runtime `torch`. Returns the names of the models it serves.

    precision: fp32, fp16 or bf16, in which the file stores the weights. torch: the parameters of the runtime. The file has
    upstream's format. An equal checkpoint that is already there is kept; other artifacts of the network are removed.

    Raises CheckpointError for unreadable weights, ValueError for another precision, DeployError as `deploy` does.
    """
    dtype = PRECISIONS[check_precision(precision)]
    network = NETWORKS[weights.network]
    serving = network.in_precision(weights.serving(), precision)
    save = _torch_saver(network)
    models = [graph.spec.name for graph in network.graphs(serving).values()]
    made_from = {"weights": weights.identity(), "precision": precision, "runtime": "torch"}
    new, configs = [_Deployed(network, serving, {})], {network.name: network.configs(serving, torch)}
    _check_in_git(repository, new, configs)
    holder, *others = network.models
    version = repository / holder / VERSION
    kept = reusable(version, made_from)
    loaded = None if kept else weights.load(dtype)  # before anything is removed, because loading checks the values
    _prepare(repository, new, configs)
    for model in others if kept else network.models:
        _remove_artifact(repository / model / VERSION)
    if kept:
        logger.info("%s: unchanged, kept", version / CHECKPOINT_FILE)
        return models
    save(loaded, version / CHECKPOINT_FILE, dtype=dtype)
    manifest = Manifest(
        model=holder,
        made_from=made_from,
        serving=dataclasses.asdict(serving),
        versions=versions_of("torch", "safetensors"),
        files={CHECKPOINT_FILE: sha256(version / CHECKPOINT_FILE)},
    )
    manifest.write(version)
    warn_of_random([manifest])
    logger.info("%s: deployed", version / CHECKPOINT_FILE)
    return models


def _torch_saver(network: Network[Any]) -> Callable[..., None]:
    """The function that writes a network's checkpoint. Raises DeployError for a network without a torch runtime."""
    if network.save is None:
        raise DeployError(
            f"weights must be of a network with a torch runtime, got {network.name}\nhint: {remake(network.models[0])}"
        )
    return network.save


def _check_parity(folder: Path, manifest: Manifest, *, required: bool) -> None:
    """Logs a warning for an artifact without a parity receipt that passed, or raises DeployError when `required` is set."""
    problem = receipt_problem(folder)
    if problem is None:
        return
    # `verify` has an option of its own for plans, because they run only on a GPU.
    option = "--engine" if "target" in manifest.made_from else "--artifacts"
    hint = f"hint: hunyuan3d-export verify {option} {folder.parent}"
    if required:
        raise DeployError(f"{folder} must have a parity receipt that passed: it {problem}\n{hint}")
    logger.warning("%s %s; %s", folder, problem, hint)


def _any_of(network: Network[Any], manifests: Mapping[Path, Manifest]) -> bool:
    return any(network_of(manifest.model) is network for manifest in manifests.values())


def _gathered(network: Network[Any], manifests: Mapping[Path, Manifest]) -> _Deployed:
    """The artifacts of `network` among `manifests`.

    Raises DeployError when they were made from different weights, or when their configs could not be those of one network.
    """
    own = {folder: manifest for folder, manifest in manifests.items() if network_of(manifest.model) is network}
    sources = {json.dumps(manifest.made_from["weights"], sort_keys=True): manifest for manifest in own.values()}
    if len(sources) > 1:
        raise DeployError(
            f"artifacts must come from the same weights, got {' and '.join(sources)}\nhint: export them again into an empty folder"
        )
    (manifest,) = sources.values()
    serving = network.serving(manifest)
    for folder, other in own.items():
        if network.serving(other) != serving:
            raise DeployError(
                f"{folder} must be served with the same facts as {manifest.model}, got {other.serving} and {manifest.serving}\n"
                "hint: export them again, in one precision, into an empty folder"
            )
    return _Deployed(network, serving, own)


def _check_profiles(new: _Deployed, configured: Any) -> None:
    """Raises DeployError for a plan whose profile is too narrow: a plan must accept the batches and the warm-up that the
    configs ask for, and the default sizes of the weights. configured: the `serving` that the configs were rendered from.
    """
    for folder, manifest in new.manifests.items():
        profile = manifest.made_from.get("profile")
        if profile is None:
            continue
        for axis, sizes in new.network.plan_sizes(configured).items():
            if axis not in profile:  # an axis of the network's other graphs
                continue
            low, _, high = profile[axis]
            if low > min(sizes) or high < max(sizes):
                raise DeployError(
                    f"{folder} must take {axis} from {min(sizes)} to {max(sizes)}, as its callers will ask, got {low} to {high}\n"
                    f"hint: build it again, with --profile no narrower than that or without"
                )


def _check_served(new: _Deployed, configs: Mapping[str, str]) -> None:
    """Raises DeployError for a plan that no config of its model serves. configs: path in the repository -> text."""
    for folder, manifest in new.manifests.items():
        target = manifest.made_from.get("target")
        own = [text for path, text in configs.items() if Path(path).parts[0] == manifest.model]
        if target is not None and not any(f'"{PLAN_FILES[target]}"' in text for text in own):
            raise DeployError(
                f"{folder} must hold a plan that a config of {manifest.model} serves, got one of target {target}\n"
                f"hint: a {new.network.title} is served from a plan of another target, or from its graph: deploy --artifacts DIR"
            )


def _check_beside(new: list[_Deployed], repository: Path) -> None:
    """Raises DeployError when a network that a new network needs is neither deployed nor among the new networks."""
    coming = {each.network.name for each in new}
    for each in new:
        for other in (NETWORKS[name] for name in each.network.beside):
            if other.name not in coming and not _is_deployed(other, repository):
                raise DeployError(
                    f"{repository} must hold a deployed {other.title} for the {each.network.title} to join, found none\n"
                    f"hint: first hunyuan3d-export deploy --artifacts DIR --repository {repository} with the {other.title}'s"
                )


def _is_deployed(network: Network[Any], repository: Path) -> bool:
    return any((repository / model / VERSION / MANIFEST).is_file() for model in network.models)


def _prepare(repository: Path, new: list[_Deployed], configs: Mapping[str, Mapping[str, str]]) -> None:
    """Writes the code and configs of the models and the facts of the networks. configs: new network -> path -> text."""
    names = {each.network.name for each in new}
    kept = [network for network in NETWORKS.values() if network.name not in names and _is_deployed(network, repository)]
    wanted = {path: text for files in configs.values() for path, text in files.items()}
    if not _is_in_git(repository):
        for network in kept:  # copy their code again too, so that all code in a repository is of one version
            manifest = next(
                Manifest.read(repository / model / VERSION, hint=_DEPLOY_AGAIN)
                for model in network.models
                if (repository / model / VERSION / MANIFEST).is_file()
            )
            wanted |= network.configs(network.serving(manifest))
        _write_models(repository, wanted)
    for each in new:
        rendered = {Path(path).parts[0] for path in wanted}
        for model in set(each.network.models) - rendered:  # left over from earlier weights, which had more graphs
            shutil.rmtree(repository / model, ignore_errors=True)
        for path, text in each.network.facts(each.serving).items():
            with atomic_path(repository / path) as temporary:
                temporary.write_text(text)


def _is_in_git(repository: Path) -> bool:
    """Whether this is the repository of a checkout: of this code's own one, or of one that is mounted into the export image."""
    repository = repository.resolve()
    return repository == SOURCE.resolve() or (
        repository.name == SOURCE.name and (repository.parent / "docker" / "versions.env").is_file()
    )


def _check_in_git(repository: Path, new: list[_Deployed], configs: Mapping[str, Mapping[str, str]]) -> None:
    """Raises DeployError for the repository in git when its configs do not fit the new networks. configs: as for _prepare."""
    if _is_in_git(repository):
        _check_unchanged(repository, {path: text for files in configs.values() for path, text in files.items()}, new)
        for each in new:
            _check_profiles(each, each.network.base)


def _check_unchanged(repository: Path, wanted: Mapping[str, str], new: list[_Deployed]) -> None:
    """Raises DeployError when these weights need other configs than those in git. The sizes of the warm-up may differ: what
    warms up the base weights warms up these weights too, and _check_profiles sees to it that their plans accept it."""
    different = [
        name
        for name, text in wanted.items()
        if not (repository / name).is_file() or not same_but_for_warmup((repository / name).read_text(), text)
    ]
    if different:
        labels = " and ".join(each.network.label(each.serving) for each in new)
        raise DeployError(
            f"the repository in git must keep its configs, and {labels} needs others ({', '.join(different)})\n"
            "hint: deploy into a copy: --repository build/repository, or for make: REPOSITORY=build/repository"
        )


def _write_models(repository: Path, wanted: Mapping[str, str]) -> None:
    for model in sorted({Path(name).parts[0] for name in wanted}):
        (repository / model / VERSION).mkdir(parents=True, exist_ok=True)  # even an ensemble needs a version folder
        code = SOURCE / model if (SOURCE / model).is_dir() else SOURCE / CODE_OF_GRAPHS
        for path in code.glob(f"{VERSION}/*.py"):
            with atomic_path(repository / model / VERSION / path.name) as temporary:
                shutil.copyfile(path, temporary)  # follows a link to the code that several models share
    for name, text in wanted.items():
        with atomic_path(repository / name) as temporary:
            temporary.write_text(text)


def _remove_artifact(version: Path) -> None:
    """Removes all files that an artifact can consist of, also those that an interrupted deploy left without a manifest."""
    # The manifest goes first, because files without a manifest do not count as deployed.
    (version / MANIFEST).unlink(missing_ok=True)
    for pattern in _ARTIFACT_FILES:
        for path in version.glob(pattern):
            path.unlink()


def _remove_artifacts(repository: Path, network: Network[Any]) -> None:
    for model in network.models:
        _remove_artifact(repository / model / VERSION)


@contextlib.contextmanager
def _copied(manifests: Mapping[Path, Manifest], repository: Path) -> Iterator[dict[Path, Path]]:
    """Copies of all files of the artifacts, which lie beside the places that they are for: copy -> place.

    They are made before the old artifacts go, so that these stay in place when there is no space for both. Copies that are left
    after the body are removed.
    """
    versions = {folder: repository / manifest.model / VERSION for folder, manifest in manifests.items()}
    copies: dict[Path, Path] = {}
    with new_folders(*versions.values()):
        try:
            for folder, manifest in manifests.items():
                version = versions[folder]
                for left in version.glob(f".*{_COPY}"):  # by a deploy that was killed
                    left.unlink()
                for name in (*manifest.files, MANIFEST):  # the manifest last: with it, an artifact counts as deployed
                    copy = version / f".{name}.{os.getpid()}{_COPY}"
                    copies[copy] = version / name
                    with naming_a_full_disk(version / name):
                        # Not a hard link: the artifact may be rewritten in place, and onnx refuses hard-linked weights.
                        shutil.copyfile(folder / name, copy)
            yield copies
        finally:
            for copy in copies:
                copy.unlink(missing_ok=True)


@contextlib.contextmanager
def _all_or_nothing(repository: Path, new: list[_Deployed]) -> Iterator[None]:
    """On any error of the body, removes every artifact of the new networks: a server must not load half of them."""
    try:
        yield
    except BaseException:
        for each in new:
            _remove_artifacts(repository, each.network)
        raise
