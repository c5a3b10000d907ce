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
        self._families: list[Any] = []  # kept, because a metric is removed when its family is collected

        def metric(
            kind: str, name: str, description: str, label: str, values: tuple[str, ...], **options: Any
        ) -> dict[str, Any]:
            self._families.append(family(name=f"hunyuan3d_{name}", description=description, kind=getattr(family, kind)))
            return {value: self._families[-1].Metric(labels={label: value} if label else {}, **options) for value in values}

        self._load = {
            name: metric("GAUGE", f"{name}_samples", f"Samples that are {name}", "", ("",))[""] for name in ("active", "queued")
        }
        self._steps = metric("COUNTER", "steps_total", "Steps made, of all samples", "", ("",))[""]
        self._forecasts = metric("COUNTER", "forecast_steps_total", "Evaluations saved by forecasts", "", ("",))[""]
        self._error = metric(
            "HISTOGRAM", "forecast_error", "Mean relative error of a sample's velocities", "", ("",), buckets=_ERRORS
        )[""]
        self._evaluations = metric("COUNTER", "evaluations_total", "Denoiser calls", "path", PATHS)
        self._requests = metric("COUNTER", "requests_total", "Requests ended", "outcome", OUTCOMES)
        self._moved = metric(
            "COUNTER", "moved_bytes_total", "Bytes handed to the denoiser, to clients and back", "tensor", MOVED
        )
        self._rows = metric("HISTOGRAM", "batch_rows", "Rows of a denoiser call", "", ("",), buckets=_ROWS)[""]
        self._seconds = metric("HISTOGRAM", "evaluation_seconds", "Time of a denoiser call", "", ("",), buckets=_SECONDS)[""]
        self._queue_s = metric(
            "HISTOGRAM",
            "queue_seconds",
            "Time from a request's arrival until it is stepped",
            "",
            ("",),
            buckets=_REQUEST_SECONDS,
        )[""]
        self._first_step_s = metric(
            "HISTOGRAM",
            "first_step_seconds",
            "Time from a request's arrival to its first step",
            "",
            ("",),
            buckets=_REQUEST_SECONDS,
        )[""]
        self._request_s = metric(
            "HISTOGRAM", "request_seconds", "Time from a request's arrival to its result", "", ("",), buckets=_REQUEST_SECONDS
        )[""]
        self._without_preview = metric("COUNTER", "previews_left_out_total", "Previews that preview_mib kept back", "", ("",))[
            ""
        ]
        self._last_load: dict[str, int] = {}

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
