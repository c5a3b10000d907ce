"""The sampler's metrics. Triton's /metrics lists them with its own; their names begin with hunyuan3d_."""

from __future__ import annotations

from typing import Any

from outcomes import OUTCOMES
from sample_request import PATHS

_ROWS = [1, 2, 4, 8, 16, 32, 64]
# An evaluation of v2-mini takes less than 10 ms on a large GPU, and one of v2-0 takes minutes on a laptop's CPU.
_SECONDS = [0.001, 0.002, 0.004, 0.007, 0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.4, 1, 3, 10, 30, 100]
_REQUEST_SECONDS = [0.03, 0.1, 0.2, 0.4, 0.7, 1, 2, 4, 7, 10, 20, 40, 70, 100, 300, 1000, 3600]
_ERRORS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1]
MOVED = ("state", "context", "velocity", "response")


class Metrics:
    """Implements stepper.Observer and counts the bytes of tensors; `family` is pb_utils.MetricFamily."""

    def __init__(self, family: Any) -> None:
        self._family = family
        self._families: list[Any] = []  # kept, because a metric is removed when its family is collected
        self._load = {name: self._gauge(f"{name}_samples", f"Samples that are {name}") for name in ("active", "queued")}
        self._steps = self._counter("steps_total", "Steps made, of all samples")
        self._forecasts = self._counter("forecast_steps_total", "Evaluations saved by forecasts")
        self._error = self._histogram("forecast_error", "Mean relative error of a sample's velocities", _ERRORS)
        self._evaluations = self._counters("evaluations_total", "Denoiser calls", "path", PATHS)
        self._requests = self._counters("requests_total", "Requests ended", "outcome", OUTCOMES)
        self._moved = self._counters("moved_bytes_total", "Bytes handed to the denoiser, to clients and back", "tensor", MOVED)
        self._rows = self._histogram("batch_rows", "Rows of a denoiser call", _ROWS)
        self._seconds = self._histogram("evaluation_seconds", "Time of a denoiser call", _SECONDS)
        since_arrival, buckets = "Time from a request's arrival", _REQUEST_SECONDS
        self._queue_s = self._histogram("queue_seconds", f"{since_arrival} until it is stepped", buckets)
        self._first_step_s = self._histogram("first_step_seconds", f"{since_arrival} to its first step", buckets)
        self._request_s = self._histogram("request_seconds", f"{since_arrival} to its result", buckets)
        self._without_preview = self._counter("previews_left_out_total", "Previews that preview_mib kept back")
        self._last_load: dict[str, int] = {}

    def _new(self, kind: str, name: str, description: str) -> Any:
        """A new family of metrics."""
        of_kind = getattr(self._family, kind)
        self._families.append(self._family(name=f"hunyuan3d_{name}", description=description, kind=of_kind))
        return self._families[-1]

    def _gauge(self, name: str, description: str) -> Any:
        return self._new("GAUGE", name, description).Metric(labels={})

    def _counter(self, name: str, description: str) -> Any:
        return self._new("COUNTER", name, description).Metric(labels={})

    def _counters(self, name: str, description: str, label: str, values: tuple[str, ...]) -> dict[str, Any]:
        """A counter for each value of the label."""
        family = self._new("COUNTER", name, description)
        return {value: family.Metric(labels={label: value}) for value in values}

    def _histogram(self, name: str, description: str, buckets: list[float]) -> Any:
        return self._new("HISTOGRAM", name, description).Metric(labels={}, buckets=buckets)

    def load(self, active: int, queued: int) -> None:
        for name, value in (("active", active), ("queued", queued)):
            if self._last_load.get(name) != value:  # setting a gauge takes 20 us
                self._last_load[name] = value
                self._load[name].set(value)

    def evaluated(self, path: str, rows: int, seconds: float) -> None:
        self._evaluations[path].increment(1)
        self._rows.observe(rows)
        self._seconds.observe(seconds)

    def stepped(self, samples: int, forecast: int) -> None:
        self._steps.increment(samples)
        if forecast:
            self._forecasts.increment(forecast)

    def forecast_error(self, error: float) -> None:
        self._error.observe(error)

    def begun(self, seconds: float) -> None:
        self._queue_s.observe(seconds)

    def first_step(self, seconds: float) -> None:
        self._first_step_s.observe(seconds)

    def done(self, seconds: float) -> None:
        self._request_s.observe(seconds)

    def preview_left_out(self) -> None:
        self._without_preview.increment(1)

    def ended(self, outcome: str) -> None:
        self._requests[outcome].increment(1)

    def moved(self, tensor: str, size_bytes: int) -> None:
        """`tensor` is one of MOVED."""
        self._moved[tensor].increment(size_bytes)
