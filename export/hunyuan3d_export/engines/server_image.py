"""The TensorRT of the server's image, and which plans that library can load.

A plan runs only on the TensorRT version that built it. docker/versions.env holds the version of the image; the images repeat it
in the environment variable TENSORRT_VERSION. `deploy` and `serve` follow the rule in this file, and so does the container, which
runs the file by itself, so it imports only the standard library.

    python server_image.py FOLDER    exits with 2 and says why, if FOLDER holds a model whose plan this image cannot load; prints
                                     the flag that the server needs for version-compatible plans, if there are any
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "TENSORRT_VERSION"
# The commands that make a plan in the server's own image. Their paths are relative to the project's folder.
BUILD = "docker compose --profile export run --rm export engine --checkpoint FILE --onnx build/onnx --out build/plans"
DEPLOY = "docker compose --profile export run --rm export deploy --artifacts build/plans"
_PLAN, _MANIFEST = "1/model.plan", "1/manifest.json"
_HERE = Path(__file__).resolve().parent


def tensorrt_version() -> str | None:
    """The image's TensorRT: the variable TENSORRT_VERSION, or else the version in versions.env. None if neither is there.

    versions.env is read from the checkout; in an installation without a checkout, from its copy inside the package.
    """
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]
    for path in (_HERE.parents[2] / "docker" / "versions.env", _HERE.parent / "versions.env"):
        if path.is_file():
            lines = path.read_text().splitlines()
            return next((line.partition("=")[2] for line in lines if line.startswith(f"{VARIABLE}=")), None)
    return None


def refusal(made_from: Mapping[str, Any], image: str | None) -> str | None:
    """Why TensorRT `image` cannot load a plan with this `made_from` in its manifest; None if it can or `image` is None.

    `image` may have fewer parts than the plan's version, which ends in a build number: 11.1.0 takes a plan of 11.1.0.106. A
    version-compatible plan also runs on later versions of the same major version.
    """
    found = str(made_from["library_version"])
    if image is None or f"{found}.".startswith(f"{image}."):
        return None
    if made_from["version_compatible"]:
        wanted = f"by TensorRT {image} or an earlier {_parts(image)[0]}.x"
        older = _parts(found)[:1] == _parts(image)[:1] and _parts(found)[: len(_parts(image))] <= _parts(image)
        return None if older else f"must be built {wanted}, got {found}"
    return f"must be built by the server image's TensorRT {image}, got {found}"


def _parts(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]


def main(folder: Path) -> int:
    """Checks the plans of all models below `folder`. Returns the exit code."""
    image, compatible = tensorrt_version(), False
    for plan in sorted(folder.glob(f"*/{_PLAN}")):
        model = plan.parents[1]
        try:
            made_from = json.loads((model / _MANIFEST).read_text())["made_from"]
            problem, compatible = refusal(made_from, image), compatible or bool(made_from["version_compatible"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = f"must have a manifest of the plan beside it, got {error!r}"
        if problem:
            sys.stderr.write(f"error: {model.name} {problem}\nhint: {BUILD}, then {DEPLOY}\n")
            return 2
    if compatible:  # such a plan carries code of its own library, which Triton's backend runs only when it is told to
        sys.stdout.write("--backend-config=tensorrt,version-compatible=true\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
