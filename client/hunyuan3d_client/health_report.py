"""What `hunyuan3d health` prints of a server: short lines that fit 80 columns, the same on a terminal and in a pipe."""

from __future__ import annotations

from pathlib import PurePosixPath

from .text_table import aligned
from .transport import Health, ModelInfo

_HEADINGS = ("model", "runs", "file", "batch")


def health_lines(url: str, state: Health, *, verbose: bool = False) -> list[str]:
    """A line about the server, a line for each model that is ready, and what is wrong or missing. verbose: the settings too."""
    ready = [model for model in state.models if model.ready]
    waiting = [model for model in state.models if not model.ready]
    verdict = "ready" if state.live and state.ready else "not ready"
    lines = [f"Triton {state.version} at {url}: {verdict}".replace("Triton  ", "Triton ")]
    rows = aligned([_HEADINGS, *map(_row, ready)], indent="  ") if ready else []
    lines += rows[:1]
    for model, row in zip(ready, rows[1:], strict=True):
        lines.append(row)
        lines += [f"      {name}: {value}" for name, value in model.parameters.items()] if verbose else []
    lines += [f"not ready: {model.name}: {model.trouble}" for model in waiting if model.trouble]
    if absent := [model.name for model in waiting if not model.trouble]:
        lines.append(f"not deployed: {', '.join(absent)}")
    if any(model.restricted for model in ready):
        lines.append("Files and settings are told to holders of the server's key alone: hunyuan3d --header 'NAME: KEY' health")
    return lines


def _row(model: ModelInfo) -> tuple[str, str, str, str]:
    """Models of the Python backend name their runtime and weights as parameters; their file is always model.py."""
    file = PurePosixPath(model.parameters.get("model_file", model.file)).name
    return model.name, model.parameters.get("runtime", model.platform), file, str(model.max_batch_size or "")
