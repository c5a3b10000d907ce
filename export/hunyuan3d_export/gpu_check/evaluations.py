"""One velocity evaluation in every runtime of this machine: its time beside the roofline, its error against float32 torch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checks import relative_l2
from ..dit import PRESETS
from ..dit.network import TOLERANCES
from ..dit.reference_sampler import Denoiser, RunnerDenoiser
from ..precisions import PRECISIONS
from .onnxruntime_runner import BoundRunner
from .rows import Job, Row, Skip
from .setting import PATHS, Networks, OneAtATime, Setting, flop, inputs_of, onnx_artifacts

ROOFLINE, EVALUATION, BUILD = "matmul", "evaluation", "build"


class Evaluations:
    """The jobs. They share the networks and the velocities of float32 torch, with which all other velocities are compared."""

    def __init__(self, setting: Setting, networks: Networks) -> None:
        self._setting = setting
        self._networks = networks
        self._expected: dict[tuple[str, str], Tensor] = {}
        self._runtime = OneAtATime()

    def rooflines(self) -> Iterator[Job]:
        """The rate of a large matrix product in each precision. The rooflines of all other rows derive from these rates."""
        for precision in PRECISIONS:
            yield Job(ROOFLINE, precision, functools.partial(self._roofline, precision))

    def in_torch(self, preset: str) -> Iterator[Job]:
        """Every precision and path in torch. float32 comes first, because the others are compared with it."""
        for precision in PRECISIONS:
            network = functools.partial(self._networks.get, preset, precision)
            yield from self._jobs("torch", preset, precision, network)

    def in_onnxruntime(self, preset: str) -> Iterator[Job]:
        def load() -> Denoiser:
            return RunnerDenoiser(BoundRunner(onnx_artifacts(self._setting, preset), self._setting.device))

        yield from self._jobs("ONNX Runtime", preset, self._setting.served_precision, load)

    def in_tensorrt(self, preset: str) -> Iterator[Job]:
        """Every path in TensorRT, after a row for the time of building the plans."""
        name = f"{preset}: plans by TensorRT, {self._setting.served_precision}"
        yield Job(BUILD, name, lambda: self._built(preset, name))
        yield from self._jobs("TensorRT", preset, self._setting.served_precision, lambda: self._engine(preset))

    def _jobs(self, runtime: str, preset: str, precision: str, load: Callable[[], Denoiser]) -> Iterator[Job]:
        for path in PATHS:
            name = f"{preset} {path}, {runtime} {precision}"
            denoiser = functools.partial(self._runtime.get, (runtime, preset, precision), load)
            yield Job(EVALUATION, name, functools.partial(self._evaluation, name, preset, path, precision, denoiser))

    def _roofline(self, precision: str) -> Row:
        rate = self._setting.stopwatch.matmul_tflops(PRECISIONS[precision])
        return Row(part=ROOFLINE, name=precision, note=f"{rate:.3g} TFLOP/s")

    @torch.inference_mode()
    def _evaluation(self, name: str, preset: str, path: str, precision: str, load: Callable[[], Denoiser]) -> Row:
        device = self._setting.device
        inputs = inputs_of(PRESETS[preset], path, device)
        expected = self._expected_of(preset, path)
        denoiser = load()
        run = functools.partial(denoiser.guided if path == "guided" else denoiser, **inputs)
        error = relative_l2(run().cpu(), expected)
        work = flop(PRESETS[preset], path, precision, form=self._setting.guided_form)
        return Row(
            part=EVALUATION,
            name=name,
            time_ms=self._setting.stopwatch.median_ms(run),
            tflop=work / 1e12,
            roofline_ms=work / 1e9 / self._setting.stopwatch.matmul_tflops(PRECISIONS[precision]),
            error=error,
            tolerance=TOLERANCES[precision].evaluation,
        )

    def _expected_of(self, preset: str, path: str) -> Tensor:
        if (preset, path) not in self._expected:
            network = self._networks.get(preset, "fp32")
            inputs = inputs_of(PRESETS[preset], path, self._setting.device)
            evaluate: Callable[..., Tensor] = network.guided if path == "guided" else network
            self._expected[preset, path] = evaluate(**inputs).cpu()
        return self._expected[preset, path]

    def _built(self, preset: str, name: str) -> Row:
        start = time.monotonic()
        self._runtime.get(("TensorRT", preset, self._setting.served_precision), lambda: self._engine(preset))
        return Row(part=BUILD, name=name, time_ms=1000 * (time.monotonic() - start), note="includes an export if needed")

    def _engine(self, preset: str) -> Denoiser:
        from ..engine_from_onnx import build_engines
        from ..engines.targets import TargetMissing, find_target
        from ..runners import PlanRunner

        if self._setting.device.type != "cuda":
            raise Skip(f"TensorRT runs on a GPU, and this run is on {self._setting.device}")
        try:
            target = find_target("tensorrt")
        except TargetMissing as error:
            raise Skip(str(error).splitlines()[0]) from error
        plans = self._setting.build / f"{preset}-{self._setting.served_precision}-tensorrt"
        build_engines(onnx_artifacts(self._setting, preset), plans, target)
        return RunnerDenoiser(PlanRunner(plans, target))
