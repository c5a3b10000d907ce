"""Repository, config name, view -> a folder of links to the models that have what they serve; prints what was left out.

Triton without model control loads all that it finds and does not start when one of them lacks its file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

VERSION = "1"
MODEL_FILE = re.compile(r'default_model_filename:\s*"([^"]+)"|key:\s*"model_file"\s*value\s*\{\s*string_value:\s*"([^"]+)"')
# The size of its pictures is the encoder's.
NEEDS = {"hunyuan3d_preprocess": ["hunyuan3d_conditioner"]}
STEP = re.compile(r'model_name:\s*"([^"]+)"')


def loadable(repository: Path, config: str) -> tuple[list[Path], list[str]]:
    """The folders that can be loaded, and for each other one why it cannot."""
    folders = {path.parent.name: path.parent for path in sorted(repository.glob("*/config.pbtxt"))}
    texts = {name: _config(folder, config) for name, folder in folders.items()}
    left_out = {}
    for name, text in texts.items():
        found = MODEL_FILE.search(text)
        file = found and (found[1] or found[2])
        if file and not (folders[name] / VERSION / file).is_file():
            left_out[name] = f"{name}: not served, config {config} wants {file} and it is not deployed"
    for name, text in texts.items():  # an ensemble needs all of its steps
        needed = [*STEP.findall(text), *NEEDS.get(name, [])]
        absent = [step for step in needed if step in left_out or step not in folders]
        if absent:
            left_out[name] = f"{name}: not served without {', '.join(absent)}"
    return [folder for name, folder in folders.items() if name not in left_out], list(left_out.values())


def _config(folder: Path, config: str) -> str:
    named = folder / "configs" / f"{config}.pbtxt"
    return (named if named.is_file() else folder / "config.pbtxt").read_text()


if __name__ == "__main__":
    folders, reasons = loadable(Path(sys.argv[1]).resolve(), sys.argv[2])
    for folder in folders:
        (Path(sys.argv[3]) / folder.name).symlink_to(folder)
    sys.stderr.write("".join(f"{reason}\n" for reason in reasons))
