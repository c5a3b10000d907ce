"""Follows the stages from a condition to latents and a mesh with progress bars, and tells what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy.typing as npt

from ..mesh import Mesh, MeshProgress
from ..requests import Step
from . import console


def followed(answers: Iterator[Any]) -> tuple[Step | None, Mesh | None]:
    """Follow the stages with a progress bar for each, if there is a terminal: the last step and the mesh, where there are any."""
    last, mesh = None, None
    with console.progress() as progress:
        bars: dict[str, Any] = {}
        for answer in answers:
            if isinstance(answer, Mesh):
                mesh = answer
                continue
            last = answer if isinstance(answer, Step) else last
            name, done, total, text = _shown(answer)
            if name not in bars:
                bars[name] = progress.add_task(name, total=None)
            progress.update(bars[name], completed=done, total=total or None, description=text)
        if mesh is not None:
            progress.update(bars["meshing"], completed=1, total=1, description=f"meshing ({mesh.faces} faces)")
    return last, mesh


def _shown(answer: Step | MeshProgress) -> tuple[str, int, int, str]:
    """A bar's name, how far it is, where it ends, and its text."""
    if isinstance(answer, Step):
        return "sampling", answer.index, answer.total, f"sampling ({answer.path}, batch {answer.batch})"
    return "meshing", answer.level, answer.levels, f"meshing ({answer.stage}, {answer.evaluations} points)"


def last_latents(step: Step | None) -> npt.NDArray[Any]:
    """The latents [B, L, 64] of a trajectory's last step, which always has them."""
    return cast(npt.NDArray[Any], cast(Step, step).latents)


def mesh_facts(mesh: Mesh | None) -> dict[str, object]:
    """What a report says of a mesh."""
    known = cast(Mesh, mesh)
    told = {name: known.statistics[name] for name in ("background", "subject_share") if name in known.statistics}
    return {"vertices": known.vertices, "faces": known.faces, "watertight": known.watertight, **told}


def step_facts(step: Step | None) -> dict[str, object]:
    """What a report says of the sampling, from its last step."""
    last = cast(Step, step)
    facts: dict[str, object] = {"steps": last.total, "path": last.path}
    if last.network_evaluations is not None and last.forecast_error is not None:
        facts |= {"network_evaluations": list(last.network_evaluations), "forecast_error": max(last.forecast_error)}
    return facts
