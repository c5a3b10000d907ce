"""The mesh model's metrics. Triton's /metrics lists them with its own; their names begin with hunyuan3d_mesh_."""

from __future__ import annotations

from typing import Any

from decoding import PARTS, MeshFile
from outcomes import OUTCOMES

_SECONDS = [0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 40, 100, 300, 1000, 3600]
_SIZES = [1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7]


class MeshMetrics:
    """Implements decoding.Observer; `family` is pb_utils.MetricFamily."""

    def __init__(self, family: Any) -> None:
        self._families: list[Any] = []  # kept, because a metric is removed when its family is collected

        def metric(kind: str, name: str, description: str, labels: dict[str, str], **options: Any) -> Any:
            self._families.append(family(name=f"hunyuan3d_mesh_{name}", description=description, kind=getattr(family, kind)))
            return self._families[-1].Metric(labels=labels, **options)

        def labelled(kind: str, name: str, description: str, label: str, values: tuple[str, ...], **options: Any) -> dict:
            first, *rest = values
            found = {first: metric(kind, name, description, {label: first}, **options)}
            return found | {value: self._families[-1].Metric(labels={label: value}, **options) for value in rest}

        self._running = metric("GAUGE", "active_decodes", "Decodes that are running", {})
        self._waiting = metric("GAUGE", "queued_decodes", "Decodes that are waiting", {})
        self._evaluations = metric("COUNTER", "evaluations_total", "Points at which the field was evaluated", {})
        self._waves = metric("COUNTER", "waves_total", "Groups of points that were evaluated together for one shape", {})
        self._requests = labelled("COUNTER", "requests_total", "Requests ended", "outcome", OUTCOMES)
        self._seconds = labelled("HISTOGRAM", "seconds", "Time of a part of a decode", "part", PARTS, buckets=_SECONDS)
        self._vertices = metric("HISTOGRAM", "vertices", "Vertices of a mesh", {}, buckets=_SIZES)
        self._faces = metric("HISTOGRAM", "faces", "Faces of a mesh", {}, buckets=_SIZES)

    def load(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def evaluated(self, points: int) -> None:
        self._evaluations.increment(points)

    def waved(self) -> None:
        self._waves.increment(1)

    def decoded(self, mesh: MeshFile) -> None:
        for part, seconds in mesh.statistics["seconds"].items():
            self._seconds[part].observe(seconds)
        self._vertices.observe(mesh.statistics["vertices"])
        self._faces.observe(mesh.statistics["faces"])

    def ended(self, outcome: str) -> None:
        self._requests[outcome].increment(1)
