"""One velocity evaluation in every runtime of this machine: its time beside the roofline, its error against float32 torch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch

from hunyuan3d_client import contract

from ..checks import relative_l2
from ..dit import PRESETS
from ..dit.network import TOLERANCES
from ..dit.reference_sampler import Denoiser, RunnerDenoiser
from ..precisions import PRECISIONS
from .graphs import Contents, artifacts_of
from .machine import at_clock
from .paths import GUIDED, GUIDED_FORMS, PATHS, TWO_BATCH, Path, with_batches
from .rows import Job, Row, Skip
from .runtimes import COMPILED, ONNX_RUNTIME, TENSORRT, TORCH, require
from .setting import BATCHES, Networks, OneAtATime, Setting
from .stopwatch import free_mib, lost_mib, peak_mib

ROOFLINE, EVALUATION, BUILD = "matmul", "evaluation", "build"
# Times that others have published for the same evaluation; they stand in the notes.
PUBLISHED = {("v2-0", TWO_BATCH, 1): "SGLang publishes 52 ms on an H100"}


class Evaluations:
    """The jobs. Those of one process share its networks and loaded runtimes."""

    def __init__(self, setting: Setting, networks: Networks) -> None:
        self._setting = setting
        self._networks = networks
        self._runtime = OneAtATime()
        self._free_before: float | None = None

    def rooflines(self) -> Iterator[Job]:
        """The rate of a large matrix product in each precision. The rooflines of all other rows derive from these rates."""
        for precision in PRECISIONS:
            yield Job(ROOFLINE, precision, functools.partial(self._roofline, precision))

    def in_torch(self, preset: str) -> Iterator[Job]:
        """The served precision in eager torch, in every path and batch size."""
        yield from self._jobs(TORCH, preset, self._setting.served_precision, with_batches(BATCHES))

    def in_other_precisions(self, preset: str) -> Iterator[Job]:
        for precision in PRECISIONS:
            if precision != self._setting.served_precision:
                yield from self._jobs(TORCH, preset, precision, ((path, 1) for path in PATHS))

    def compiled(self, preset: str) -> Iterator[Job]:
        """torch.compile, block by block, for the paths that serve classifier-free guidance."""
        yield from self._jobs(COMPILED, preset, self._setting.served_precision, ((path, 1) for path in (TWO_BATCH, *GUIDED)))

    def in_onnxruntime(self, preset: str) -> Iterator[Job]:
        yield from self._jobs(ONNX_RUNTIME, preset, self._setting.served_precision, with_batches(BATCHES[:2]))

    def in_tensorrt(self, preset: str) -> Iterator[Job]:
        """TensorRT, after a row for the time of building the plans."""
        name = f"{preset}: plans by TensorRT, {self._setting.served_precision}"
        yield Job(BUILD, name, functools.partial(self._built, preset, name))
        yield from self._jobs(TENSORRT, preset, self._setting.served_precision, with_batches(BATCHES))

    def _jobs(self, runtime: str, preset: str, precision: str, cases: Iterator[tuple[Path, int]]) -> Iterator[Job]:
        # The graphs of another form are other artifacts, so the cases of one form stand together.
        for path, batch in sorted(cases, key=lambda case: GUIDED_FORMS.index(_form(case[0]))):
            name = f"{preset} {path}, B {batch}, {runtime} {precision}"
            run = functools.partial(self._evaluation, name, runtime, preset, precision, path, batch)
            yield Job(EVALUATION, name, run)

    def _roofline(self, precision: str) -> Row:
        rate = self._setting.stopwatch.matmul_tflops(PRECISIONS[precision])
        return Row(part=ROOFLINE, name=precision, note=f"{rate:.3g} TFLOP/s{at_clock(self._setting.device)}")

    @torch.inference_mode()
    def _evaluation(self, name: str, runtime: str, preset: str, precision: str, path: Path, batch: int) -> Row:
        device, chosen = self._setting.device, PRESETS[preset]
        inputs = path.inputs(chosen, device, batch=batch)
        rows, most = len(inputs["latents"]), contract.AXES["B"].max
        if runtime == TENSORRT and rows > most:
            raise Skip(f"{rows} rows are more than the {most} of a plan's profile")
        denoiser = self._denoiser(runtime, preset, precision, path)
        two_batch = self._networks.expected(preset)
        expected = path.expected(two_batch, batch=batch)
        run = functools.partial(path.call(denoiser), **inputs)
        error = relative_l2(run().cpu(), expected)
        work = path.flop(chosen, precision, batch=batch)
        time_ms = self._setting.stopwatch.median_ms(run)
        return Row(
            part=EVALUATION,
            name=name,
            time_ms=time_ms,
            tflop=work / 1e12,
            roofline_ms=work / 1e9 / self._setting.stopwatch.matmul_tflops(PRECISIONS[precision]),
            memory_mib=self._memory_mib(runtime, run),
            error=error,
            tolerance=TOLERANCES[precision].evaluation * path.amplification(two_batch),
            note=self._note(runtime, preset, path, batch),
        )

    def _note(self, runtime: str, preset: str, path: Path, batch: int) -> str:
        if runtime == COMPILED and self._compiler(path) == "aot_eager":
            return "only traced; a GPU run compiles it"
        return PUBLISHED.get((preset, path, batch), "")

    def _memory_mib(self, runtime: str, run: Callable[[], object]) -> float | None:
        if runtime in (TORCH, COMPILED):
            return peak_mib(run, self._setting.device)
        return lost_mib(self._free_before, self._setting.device)

    def _denoiser(self, runtime: str, preset: str, precision: str, path: Path) -> Denoiser:
        """The preset's denoiser in this runtime. Raises Skip where this machine cannot run it."""
        if runtime == TORCH:
            self._networks.expected(preset)  # first, because only one network is on the device at a time
            return self._networks.get(preset, precision)
        load = {COMPILED: self._compiled, ONNX_RUNTIME: self._session, TENSORRT: self._engine}[runtime]
        require(runtime, self._setting.device)

        how = self._compiler(path) if runtime == COMPILED else _form(path)

        def after_expected() -> Denoiser:
            self._networks.expected(preset)  # first, so that the float32 network does not count as this runtime's memory
            self._free_before = free_mib(self._setting.device)
            return load(preset, precision, how)

        return self._runtime.get((runtime, preset, precision, _form(path), how), after_expected)

    def _compiler(self, path: Path) -> str:
        """The backend of torch.compile. On a CPU, inductor takes half a minute for each path. There it compiles one path, and the
        others are only traced."""
        return "inductor" if self._setting.device.type == "cuda" or path == TWO_BATCH else "aot_eager"

    def _compiled(self, preset: str, precision: str, compiler: str) -> Denoiser:
        network = self._networks.get(preset, precision)
        # Block by block: the compiler then meets two blocks instead of 48, seconds instead of minutes.
        for block in (*network.double_blocks, *network.single_blocks):
            block.compile(backend=compiler, dynamic=False)
        return network

    def _session(self, preset: str, precision: str, form: str) -> Denoiser:
        from .onnxruntime_runner import BoundRunner

        return RunnerDenoiser(BoundRunner(artifacts_of(self._setting, Contents(preset, precision, form)), self._setting.device))

    def _engine(self, preset: str, precision: str, form: str) -> Denoiser:
        from ..engine_from_onnx import build_engines
        from ..engines.targets import find_target
        from ..runners import PlanRunner

        target, plans = find_target("tensorrt"), self._setting.build / f"{preset}-{precision}-{form}-tensorrt"
        build_engines(artifacts_of(self._setting, Contents(preset, precision, form)), plans, target)
        return RunnerDenoiser(PlanRunner(plans, target))

    def _built(self, preset: str, name: str) -> Row:
        start = time.monotonic()
        self._denoiser(TENSORRT, preset, self._setting.served_precision, GUIDED[0])
        note = "includes the graphs' weights, or an export"
        return Row(part=BUILD, name=name, time_ms=1000 * (time.monotonic() - start), note=note)


def _form(path: Path) -> str:
    """The form of the graphs that a path runs on. Plain graphs are made once, with those of the first form."""
    return path.form or GUIDED_FORMS[0]
