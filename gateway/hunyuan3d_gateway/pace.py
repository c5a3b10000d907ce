"""How long jobs take here: a running mean, from which the time left is estimated."""

from __future__ import annotations

_KEPT = 0.8  # the share of the old mean in the new


class Pace:
    """Means of seconds: of whole jobs and, by resolution, of making the mesh of sampled latents."""

    def __init__(self) -> None:
        self.job_s: float | None = None
        self._mesh_s: dict[int, float] = {}

    def note(self, *, job_s: float, mesh_s: float, resolution: int) -> None:
        """Learn from a finished job."""
        self.job_s = _mean(self.job_s, job_s)
        self._mesh_s[resolution] = _mean(self._mesh_s.get(resolution), mesh_s)

    def mesh_s(self, resolution: int) -> float | None:
        """What a mesh of a resolution takes; from another resolution, by the number of points near a surface."""
        if resolution in self._mesh_s or not self._mesh_s:
            return self._mesh_s.get(resolution)
        nearest = min(self._mesh_s, key=lambda known: abs(known - resolution))
        return self._mesh_s[nearest] * (resolution / nearest) ** 2

    def wait_s(self, ahead: int, running: int) -> float | None:
        """How long a job with so many before it waits until it has ended, where `running` are made at a time."""
        return None if self.job_s is None else self.job_s * (1 + ahead / max(1, running))


def _mean(before: float | None, value: float) -> float:
    return value if before is None else _KEPT * before + (1 - _KEPT) * value
