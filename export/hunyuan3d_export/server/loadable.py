"""Finds the models of a repository that a server can load: their file is deployed, and so are the models that they need.

Without model control, Triton loads every folder that it finds and does not start when one of them lacks its file. The embedded
server and the container both follow the rule in this file. The container runs the file by itself, so it imports only the
standard library.

    python loadable.py REPOSITORY CONFIG FOLDER    fills FOLDER with links to the models that can be loaded, and prints the
                                                   server's flag for the memory of a GPU, if any of them may use one
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

VERSION = "1"
FACTS, POOL_BYTES = "preset.json", "cuda_memory_pool_bytes"
_FILE = re.compile(r'default_model_filename:\s*"([^"]+)"|key:\s*"model_file"\s*value\s*\{\s*string_value:\s*"([^"]+)"')
_NEEDS = re.compile(r'key:\s*"needs"\s*value\s*\{\s*string_value:\s*"([^"]+)"')
_LANES = re.compile(r'key:\s*"lanes"\s*value\s*\{\s*string_value:\s*"(\d+)"')
_GROUP = re.compile(r"instance_group\s*:?\s*\[?\s*\{([^}]*)\}")
# An instance group that may be on a GPU. Without a kind, which is what a rendered KIND_AUTO looks like, it is where there is one.
_GPU = re.compile(r"instance_group\s*\[?\s*\{(?![^}]*KIND_CPU)")
_STEP = re.compile(r'model_name:\s*"([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Loadable:
    """models: the folders that can be loaded. missing: model -> the reason why it cannot be loaded. files: model -> the file
    that its config serves, "" for a model that consists of code alone. warnings: sentences about configs that do not fit together."""

    models: list[Path]
    missing: dict[str, str]
    files: dict[str, str]
    warnings: list[str]


def loadable(repository: Path, config: str) -> Loadable:
    """The models of `repository` that a server with `--model-config-name config` can load."""
    folders = {path.parent.name: path.parent for path in sorted(repository.glob("*/config.pbtxt"))}
    texts = {name: _config(folder, config) for name, folder in folders.items()}
    files = {name: _served_file(text) for name, text in texts.items()}
    missing = {
        name: f"config {config} wants {file}, which is not deployed"
        for name, file in files.items()
        if file and not (folders[name] / VERSION / file).is_file()
    }
    while lacking := {
        name: model for name in folders if name not in missing and (model := _lacking(texts[name], folders, missing))
    }:
        missing |= {name: f"it needs {model}" for name, model in lacking.items()}
    models = [folder for name, folder in folders.items() if name not in missing]
    return Loadable(models, missing, files, _lane_warnings({folder.name: texts[folder.name] for folder in models}))


def _lane_warnings(texts: dict[str, str]) -> list[str]:
    """A sentence for each model whose `lanes` are not as many as the instances of a model that it needs. texts: of all models."""
    found = []
    for name, text in texts.items():
        lanes, needs = _LANES.search(text), _NEEDS.search(text)
        if lanes is None or needs is None:
            continue
        for model in re.split("[ |]", needs[1]):
            if model in texts and (count := instances(texts[model])) != int(lanes[1]):
                found.append(
                    f"{name}: lanes must be {count}, one for each instance of {model}, got {lanes[1]}; "
                    "set both in their configs, or instances stay idle or calls wait"
                )
    return found


def instances(text: str) -> int:
    """How many instances of a model evaluate at the same time: in each group `count` (1 if left out) on each of its GPUs."""
    total = 0
    for group in _GROUP.findall(text):
        count = re.search(r"count:\s*(\d+)", group)
        gpus = " ".join(re.findall(r"gpus:\s*\[?([\d,\s]+)", group))
        total += (int(count[1]) if count else 1) * max(1, len(re.findall(r"\d+", gpus)))
    return max(1, total)


def memory_pool_flags(found: Loadable, config: str) -> list[str]:
    """The size of the CUDA memory pool on the first GPU as a flag of tritonserver, if a model may run on a GPU.

    Calls between models take their tensors from this pool. A deployment writes the size that its tensors need into a JSON file
    of facts beside the code. Triton's own size would be too small for several contexts of four views.
    """
    if not any(_GPU.search(_config(folder, config)) for folder in found.models):
        return []
    facts = [json.loads(path.read_text()) for folder in found.models for path in folder.glob(f"{VERSION}/{FACTS}")]
    sizes = [int(fact[POOL_BYTES]) for fact in facts if POOL_BYTES in fact]
    return [f"--cuda-memory-pool-byte-size=0:{max(sizes)}"] if sizes else []


def _lacking(text: str, folders: dict[str, Path], missing: dict[str, str]) -> str:
    """The first model that this config needs but that cannot be loaded; "" for none. An ensemble needs each of its steps."""
    needs = _NEEDS.search(text)
    groups = [*_STEP.findall(text), *(needs[1].split() if needs else [])]
    absent = [group for group in groups if not any(name in folders and name not in missing for name in group.split("|"))]
    return absent[0].replace("|", " or ") if absent else ""


def _served_file(text: str) -> str:
    found = _FILE.search(text)
    return (found[1] or found[2]) if found else ""


def _config(folder: Path, config: str) -> str:
    named = folder / "configs" / f"{config}.pbtxt"
    return (named if named.is_file() else folder / "config.pbtxt").read_text()


if __name__ == "__main__":
    found = loadable(Path(sys.argv[1]).resolve(), sys.argv[2])
    for folder in found.models:
        (Path(sys.argv[3]) / folder.name).symlink_to(folder)
    sys.stdout.write("".join(f"{flag}\n" for flag in memory_pool_flags(found, sys.argv[2])))
    sys.stderr.write("".join(f"{name}: not served, {reason}\n" for name, reason in found.missing.items()))
    sys.stderr.write("".join(f"warning: {text}\n" for text in found.warnings))
