"""Artifacts, or a checkpoint itself -> a Triton model repository: configs that fit, and only files that are proven whole."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from hunyuan3d_client import contract

from .configs import CHECKPOINT_FILE, artifact_file, config_files, plan_sizes, read_config
from .dit import Preset, save_checkpoint
from .files import ONNX_FILE, PLAN_FILE, atomic_path, sha256
from .gpu import first_gpu
from .image_configs import image_config_files
from .manifest import NAME as MANIFEST
from .manifest import Manifest, read_artifacts, reusable, versions_of
from .tensorrt_targets import installed_version
from .weights import PRECISIONS, Weights, preset_from_json

_CHECKOUT = Path(__file__).parent.parent.parent / "model_repository"
# The tree that is copied: the one in git, or in an installation without a checkout the one inside the package.
SOURCE = _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parent / "model_repository"
DEFAULT_REPOSITORY = _CHECKOUT if _CHECKOUT.is_dir() else Path("model_repository")
PRESET_FILE = "preset.json"  # beside the sampler's model.py: default L and scale factor of the deployed weights
VERSION = "1"
TORCH_CONFIG = "torch"
# With what goes beside them, and what a copy that was killed left.
_ARTIFACT_FILES = tuple(
    form.format(name) for name in (ONNX_FILE, PLAN_FILE, CHECKPOINT_FILE, MANIFEST) for form in ("{}*", ".{}*.partial")
)

logger = logging.getLogger(__name__)


class DeployError(ValueError):
    """The artifacts cannot be placed into this repository as asked."""


def deploy(artifacts: Path, repository: Path = DEFAULT_REPOSITORY) -> list[str]:
    """Places every artifact folder below `artifacts` into `repository`; the names of the models that can now be served.

    The repository in git takes any preset whose configs equal the ones in git; another folder becomes a copy of it with
    configs of its own. Files are copied; denoisers the artifacts lack are removed. An image encoder alone joins the denoisers
    that are deployed already, and stays when those are replaced.

    Raises ManifestError for a folder without a matching manifest, DeployError when the repository cannot take the preset.
    """
    manifests = read_artifacts(artifacts, hint=f"make them again with: hunyuan3d-export onnx --out {artifacts}")
    for folder, manifest in manifests.items():
        check_plan(manifest, folder)
    denoisers = [manifest for manifest in manifests.values() if manifest.model != contract.CONDITIONER]
    image_configs = _image_configs(manifests.values(), repository)
    if denoisers:
        preset = _common_preset(denoisers)
        _check_profiles(manifests, preset)
        _prepare(repository, preset, {**config_files(preset), **image_configs})
        for name in (contract.DIT, contract.DIT_GUIDED):
            _remove_artifact(repository / name / VERSION)
    else:
        _check_denoiser(repository)
        _write_models(repository, image_configs, "the image encoder")
    if len(denoisers) < len(manifests):
        _remove_artifact(repository / contract.CONDITIONER / VERSION)
    for folder, manifest in manifests.items():
        _place(folder, manifest, repository / manifest.model / VERSION)
        logger.info("%s: deployed into %s", manifest.model, repository)
    return [manifest.model for manifest in manifests.values()]


def deploy_checkpoint(
    weights: Weights, repository: Path = DEFAULT_REPOSITORY, *, precision: str = "fp32", torch: Mapping[str, str] | None = None
) -> list[str]:
    """Places the weights themselves, stored as fp32, fp16 or bf16, for the runtime `torch`; the models it serves them by.

    torch: the runtime's parameters (configs.torch_parameters). A checkpoint that is already there is kept; other artifacts
    are removed. The file has upstream's format.

    Raises CheckpointError for unreadable weights, ValueError for another precision, DeployError as `deploy` does.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    preset = weights.sampling(weights.config())
    models = [contract.DIT] if preset.config.guidance_embed else [contract.DIT, contract.DIT_GUIDED]
    made_from = {"weights": weights.identity(), "precision": precision, "runtime": "torch"}
    _prepare(repository, preset, {**config_files(preset, torch), **_image_configs((), repository)})
    _remove_artifact(repository / contract.DIT_GUIDED / VERSION)
    version = repository / contract.DIT / VERSION
    if reusable(version, made_from):
        logger.info("%s: unchanged, kept", version / CHECKPOINT_FILE)
        return models
    _remove_artifact(version)
    dtype = PRECISIONS[precision]
    save_checkpoint(weights.load(dtype), version / CHECKPOINT_FILE, dtype=dtype)
    Manifest(
        model=contract.DIT,
        made_from=made_from,
        serving=dataclasses.asdict(preset),
        versions=versions_of("torch", "safetensors"),
        files={CHECKPOINT_FILE: sha256(version / CHECKPOINT_FILE)},
    ).write(version)
    logger.info("%s: deployed", version / CHECKPOINT_FILE)
    return models


def loadable_models(repository: Path, config_name: str) -> list[str]:
    """The models of `repository` that have what their config serves; denoisers without an artifact are left out.

    Raises DeployError when there is no repository or no denoiser to serve.
    """
    folders = sorted(path.parent for path in repository.glob("*/config.pbtxt"))
    source = "--checkpoint FILE" if config_name == TORCH_CONFIG else "--artifacts DIR"
    hint = f"hint: hunyuan3d-export deploy {source} --repository {repository}"
    if not folders:
        raise DeployError(f"{repository} must be a model repository, found no config.pbtxt\n{hint}")
    wanted = {folder: artifact_file(read_config(folder, config_name)) for folder in folders}
    absent = [folder for folder, file in wanted.items() if file and not (folder / VERSION / file).is_file()]
    denoisers = [folder for folder in folders if folder.name in (contract.DIT, contract.DIT_GUIDED)]
    for folder in absent:
        # Most repositories have no image encoder: nothing to warn of.
        level = logging.WARNING if folder in denoisers else logging.INFO
        logger.log(level, "%s: not served, config %s wants %s and it is not deployed", folder.name, config_name, wanted[folder])
    for folder in set(folders) - set(absent):
        if wanted[folder] == PLAN_FILE:
            check_plan(Manifest.read(folder / VERSION, hint="deploy it again with: hunyuan3d-export deploy"), folder / VERSION)
    if set(denoisers) <= set(absent):
        files = ", ".join(sorted({str(wanted[folder]) for folder in denoisers}))
        raise DeployError(f"{repository} must hold a deployed {files} for config {config_name}, found none\n{hint}")
    if any(folder.name == contract.CONDITIONER for folder in absent):
        absent += [folder for folder in folders if folder.name in contract.IMAGE_MODELS]
    return [folder.name for folder in folders if folder not in absent]


def check_plan(manifest: Manifest, folder: Path) -> None:
    """Holds a plan against what is on this machine; an ONNX artifact passes, and so does a plan where nothing can be asked.

    Raises DeployError, with the command that makes the right plan, for a plan that Triton here could not load.
    """
    target = manifest.made_from.get("target")
    if target is None:
        return
    hint = "hint: on the machine that will serve: hunyuan3d-export engine --target tensorrt --onnx DIR --out DIR"
    if target != "tensorrt":
        raise DeployError(f"{folder} must hold a plan of target tensorrt, which Triton's backend loads, got {target}\n{hint}")
    if manifest.made_from.get("weight_stripped"):
        raise DeployError(
            f"{folder} must hold a plan with weights, got a weight-stripped one\n"
            f"hint: hunyuan3d-export refit --plan DIR --onnx DIR --out DIR, then deploy that"
        )
    version, wanted = installed_version("tensorrt"), manifest.made_from["library_version"]
    if version is not None and version != wanted and not manifest.made_from["version_compatible"]:
        raise DeployError(f"{folder} must be built by this machine's TensorRT {version}, got {wanted}\n{hint}")
    gpu, capabilities = first_gpu(), manifest.made_from["compute_capabilities"]
    if gpu is not None and gpu.compute_capability not in capabilities and not manifest.made_from["hardware_compatible"]:
        raise DeployError(
            f"{folder} must be built for this machine's {gpu.compute_capability} ({gpu.name}), got {', '.join(capabilities)}\n{hint}"
        )


def _check_profiles(manifests: Mapping[Path, Manifest], preset: Preset) -> None:
    """The configs let the sampler stack 8 rows and warm up at usual sizes: a plan must take that, and the preset's own sizes.

    Raises DeployError.
    """
    for folder, manifest in manifests.items():
        profile = manifest.made_from.get("profile")
        if profile is None or manifest.model == contract.CONDITIONER:
            continue
        for axis, sizes in plan_sizes(preset).items():
            low, _, high = profile[axis]
            if low > min(sizes) or high < max(sizes):
                raise DeployError(
                    f"{folder} must take {axis} from {min(sizes)} to {max(sizes)}, as the sampler will ask, got {low} to {high}\n"
                    f"hint: build it again, with --profile no narrower than that or without"
                )


def _common_preset(manifests: Iterable[Manifest]) -> Preset:
    sources = {json.dumps(manifest.made_from["weights"], sort_keys=True): manifest.serving for manifest in manifests}
    if len(sources) > 1:
        raise DeployError(
            f"artifacts must come from the same weights, got {' and '.join(sources)}\nhint: export them again into an empty folder"
        )
    (serving,) = sources.values()
    return preset_from_json(serving)


def _image_configs(manifests: Iterable[Manifest], repository: Path) -> dict[str, str]:
    """The image models' configs for the new encoder, or the one that is deployed; none without: Triton would try to load them."""
    found = [manifest for manifest in manifests if manifest.model == contract.CONDITIONER]
    deployed = repository / contract.CONDITIONER / VERSION
    if not found and (deployed / MANIFEST).is_file():
        found = [Manifest.read(deployed, hint="deploy it again with: hunyuan3d-export deploy")]
    return image_config_files(found[0].serving["image_size"]) if found else {}


def _check_denoiser(repository: Path) -> None:
    if not any((repository / name / VERSION / MANIFEST).is_file() for name in (contract.DIT, contract.DIT_GUIDED)):
        raise DeployError(
            f"{repository} must hold a deployed denoiser for the image encoder to join, found none\n"
            f"hint: first hunyuan3d-export deploy --artifacts DIR --repository {repository} with the denoiser's"
        )


def _prepare(repository: Path, preset: Preset, wanted: Mapping[str, str]) -> None:
    """The models' code and configs, and the preset's name; the repository in git must already have these configs."""
    _write_models(repository, wanted, preset.name)
    for name in {contract.DIT, contract.DIT_GUIDED} - {Path(path).parts[0] for path in wanted}:
        shutil.rmtree(repository / name, ignore_errors=True)  # of an earlier preset
    facts = {"preset": preset.name, "num_latents": preset.num_latents, "scale_factor": preset.scale_factor}
    with atomic_path(repository / contract.SAMPLER / VERSION / PRESET_FILE) as temporary:
        temporary.write_text(json.dumps(facts) + "\n")


def _write_models(repository: Path, wanted: Mapping[str, str], reason: str) -> None:
    if repository.resolve() == SOURCE.resolve():
        different = [name for name, text in wanted.items() if (SOURCE / name).read_text() != text]
        if different:
            raise DeployError(
                f"the repository in git must keep its configs, and {reason} needs others ({', '.join(different)})\n"
                "hint: deploy into a copy: --repository build/repository"
            )
        return
    for model in sorted({Path(name).parts[0] for name in wanted}):
        (repository / model / VERSION).mkdir(parents=True, exist_ok=True)  # Triton wants one even for an ensemble
        for path in (SOURCE / model).glob(f"{VERSION}/*.py"):
            with atomic_path(repository / path.relative_to(SOURCE)) as temporary:
                shutil.copyfile(path, temporary)
    for name, text in wanted.items():
        with atomic_path(repository / name) as temporary:
            temporary.write_text(text)


def _remove_artifact(version: Path) -> None:
    """Everything an artifact can consist of, also what an interrupted deploy left without a manifest."""
    (version / MANIFEST).unlink(missing_ok=True)  # first: what is left without it is not a deployed artifact
    for pattern in _ARTIFACT_FILES:
        for path in version.glob(pattern):
            path.unlink()


def _place(folder: Path, manifest: Manifest, version: Path) -> None:
    for name in manifest.files:
        with atomic_path(version / name) as temporary:
            # A copy, not a hard link: the artifact may be rewritten in place, and onnx refuses weights with two names.
            shutil.copyfile(folder / name, temporary)
    with atomic_path(version / MANIFEST) as temporary:  # last: with it the artifact counts as deployed
        shutil.copyfile(folder / MANIFEST, temporary)
