"""The mesh stage's two graphs in every runtime: the keys and values of a shape, and the field at a wave of points."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hunyuan3d_client import contract

from ..checks import relative_l2
from ..precisions import PRECISIONS
from ..runners import Runner, TorchRunner
from ..shapevae import PRESETS, ShapeVAEPreset, compute, random_model
from ..shapevae.network import TOLERANCES, example_inputs, graphs, in_precision
from .graphs import Contents, artifacts_of
from .rows import Job, Row
from .runtimes import ONNX_RUNTIME, TENSORRT, TORCH, require
from .setting import OneAtATime, Setting
from .stopwatch import free_mib, lost_mib, peak_mib

PART = "mesh stage"
POINTS = contract.POINT_BUCKETS[-1]


@dataclasses.dataclass(frozen=True)
class Case:
    """One evaluation of a model, contract.VAE or contract.FIELD, for `batch` different shapes."""

    model: str
    batch: int

    def __str__(self) -> str:
        graph = "keys and values" if self.model == contract.VAE else f"field, P {POINTS}"
        return f"{graph}, B {self.batch}"

    def inputs(self, preset: ShapeVAEPreset) -> dict[str, Tensor]:
        """Inputs at the preset's own L, with k and v in the dtype that the preset names."""
        return example_inputs(preset, self.model, (self.batch, preset.num_latents, POINTS))

    def flop(self, preset: ShapeVAEPreset) -> int:
        if self.model == contract.VAE:
            return self.batch * compute.keys_values(preset.config, latent_tokens=preset.num_latents).total
        return self.batch * compute.field(preset.config, latent_tokens=preset.num_latents, points=POINTS).total


CASES = (Case(contract.VAE, 1), Case(contract.FIELD, 1), Case(contract.FIELD, 8))


class MeshRows:
    """The jobs. Those of one process share its loaded runtimes and the expected outputs."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._runtime, self._outputs = OneAtATime(), OneAtATime()
        self._free_before: float | None = None

    def jobs(self, preset: str) -> Iterator[Job]:
        for runtime in (TORCH, TENSORRT, ONNX_RUNTIME):
            for case in CASES:
                name = f"{preset} {case}, {runtime} {self._setting.served_precision}"
                yield Job(PART, name, functools.partial(self._measured, name, runtime, preset, case))

    @torch.inference_mode()
    def _measured(self, name: str, runtime: str, preset: str, case: Case) -> Row:
        device, precision = self._setting.device, self._setting.served_precision
        require(runtime, device)
        chosen = in_precision(PRESETS[preset], precision)
        expected = self._expected(preset)[case]
        runner = self._runtime.get((runtime, preset), functools.partial(self._loaded, runtime, chosen))
        inputs = {tensor: value.to(device) for tensor, value in case.inputs(chosen).items()}
        run = functools.partial(runner.run, case.model, inputs)
        found = run()
        work = case.flop(chosen)
        return Row(
            part=PART,
            name=name,
            error=max(relative_l2(value.cpu(), expected[tensor]) for tensor, value in found.items()),
            tolerance=TOLERANCES[case.model][precision],
            time_ms=self._setting.stopwatch.median_ms(run),
            tflop=work / 1e12,
            roofline_ms=work / 1e9 / self._setting.stopwatch.matmul_tflops(PRECISIONS[precision]),
            memory_mib=peak_mib(run, device) if runtime == TORCH else lost_mib(self._free_before, device),
        )

    def _expected(self, preset: str) -> dict[Case, dict[str, Tensor]]:
        """The outputs of every case in float32 torch, on the CPU, for the inputs that the measured graphs get."""
        return self._outputs.get(preset, functools.partial(self._in_float32, PRESETS[preset]))

    def _in_float32(self, preset: ShapeVAEPreset) -> dict[Case, dict[str, Tensor]]:
        device, inputs_of = self._setting.device, in_precision(preset, self._setting.served_precision)
        runner = self._in_torch(in_precision(preset, "fp32"), "fp32")
        found = {}
        for case in CASES:
            inputs = {tensor: value.to(device) for tensor, value in case.inputs(inputs_of).items()}
            found[case] = {tensor: value.cpu() for tensor, value in runner.run(case.model, inputs).items()}
        return found

    def _in_torch(self, preset: ShapeVAEPreset, precision: str) -> Runner:
        decoder = random_model(
            preset.config, include_pi=preset.include_pi, dtype=PRECISIONS[precision], attention_backend="sdpa"
        )
        return TorchRunner(decoder, graphs(preset), device=str(self._setting.device))

    def _loaded(self, runtime: str, preset: ShapeVAEPreset) -> Runner:
        precision, device = self._setting.served_precision, self._setting.device
        self._free_before = free_mib(device)
        if runtime == TORCH:
            return self._in_torch(preset, precision)
        contents = Contents(preset.name, precision, network="vae")
        artifacts = artifacts_of(self._setting, contents)
        if runtime == ONNX_RUNTIME:
            from .onnxruntime_runner import BoundRunner

            return BoundRunner(artifacts, device)
        from ..engine_from_onnx import build_engines
        from ..engines.targets import find_target
        from ..runners import PlanRunner

        target, plans = find_target("tensorrt"), self._setting.build / f"{contents.name}-tensorrt"
        build_engines(artifacts, plans, target)
        return PlanRunner(plans, target)
