"""Metrics for Prometheus, in a registry of each gateway's own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .jobs import Job

_SECONDS = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Metrics:
    """What this gateway has done. The numbers of jobs by state are those of the whole database."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "hunyuan3d_gateway_"
        self._jobs = Gauge(f"{name}jobs", "Jobs in the database by state.", ["state"], registry=self.registry)
        self._running = Gauge(f"{name}running", "Jobs that this gateway runs now.", registry=self.registry)
        self._store = Gauge(f"{name}store_bytes", "Size of all files in the store.", registry=self.registry)
        self._ended = Counter(f"{name}ended", "Jobs that ended here.", ["interface", "outcome"], registry=self.registry)
        self._seconds = Histogram(f"{name}job_seconds", "Time from claim to end.", buckets=_SECONDS, registry=self.registry)
        self._requests = Counter(f"{name}requests", "HTTP requests.", ["route", "status"], registry=self.registry)

    def ended(self, job: Job, outcome: str, seconds: float) -> None:
        """Count a job's end."""
        self._ended.labels(job.interface, outcome).inc()
        self._seconds.observe(seconds)

    def answered(self, route: str, status: int) -> None:
        """Count a request. route: its pattern, without ids."""
        self._requests.labels(route, str(status)).inc()

    def text(self, counts: Mapping[str, int], running: int, store_bytes: int) -> bytes:
        """All metrics in Prometheus' text format."""
        for state, count in counts.items():
            self._jobs.labels(state).set(count)
        self._running.set(running)
        self._store.set(store_bytes)
        return generate_latest(self.registry)
