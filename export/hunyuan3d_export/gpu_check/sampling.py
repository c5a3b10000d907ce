"""A whole guided sampling, in this process and through the embedded tritonserver."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch

from ..dit import PRESETS, Preset
from ..dit.network import example_inputs
from ..dit.reference_sampler import sample, sigmas
from ..dit.weights import Weights
from ..precisions import PRECISIONS
from .paths import GUIDANCE_SCALE, GUIDED
from .rows import Job, Row, Skip
from .setting import Networks, Setting
from .stopwatch import seconds

PART = "sample"
_NEEDED = ("pytriton", "tritonclient", "safetensors")
_TIMEOUT_S = 600.0


class Samplings:
    """The jobs of one preset: flow_match sampling by guided evaluations in the network's own form, at GUIDANCE_SCALE."""

    def __init__(self, setting: Setting, networks: Networks) -> None:
        self._setting = setting
        self._networks = networks

    def in_process(self, preset: str) -> Iterator[Job]:
        name = f"{preset}, {self._setting.steps} steps, torch {self._setting.served_precision}, in one process"
        yield Job(PART, name, functools.partial(self._here, preset, name))

    def served(self, preset: str) -> Iterator[Job]:
        name = f"{preset}, {self._setting.steps} steps, torch {self._setting.served_precision}, served by tritonserver"
        yield Job(PART, name, functools.partial(self._served, preset, name))

    @torch.inference_mode()
    def _here(self, preset: str, name: str) -> Row:
        device = self._setting.device
        chosen = PRESETS[preset]
        inputs = example_inputs((1, chosen.num_latents, chosen.context_tokens))
        latents, context = inputs["latents"].to(device), inputs["context"].to(device)
        network = self._networks.get(preset, self._setting.served_precision)

        def run(steps: int) -> object:
            times = sigmas("flow_match", steps)
            return sample(network, context, latents, times, guidance_scale=GUIDANCE_SCALE, path="guided")

        run(2)
        return self._row(name, chosen, seconds(lambda: run(self._setting.steps), device))

    def _served(self, preset: str, name: str) -> Row:
        """Samples on a tritonserver with the torch runtime on this device. The client sends the context once per sample."""
        if absent := [package for package in _NEEDED if importlib.util.find_spec(package) is None]:
            raise Skip(f"the embedded server needs {', '.join(absent)}")
        from hunyuan3d_client import Client

        from ..dit.configs import torch_parameters
        from ..repository_from_artifacts import deploy_checkpoint
        from ..server.embedded import TORCH_CONFIG, EmbeddedServer, ServerOptions

        chosen, precision = PRESETS[preset], self._setting.served_precision
        repository = self._setting.work / f"{preset}-repository"
        on_cpu = ["threads=1"] if self._setting.device.type == "cpu" else []  # more are slower on a busy machine
        parameters = torch_parameters([f"device={self._setting.device}", *on_cpu])
        deploy_checkpoint(Weights(preset=preset), repository, precision=precision, torch=parameters)
        inputs = example_inputs((1, chosen.num_latents, chosen.context_tokens))
        latents, context = inputs["latents"].numpy(), inputs["context"].numpy()
        with EmbeddedServer(repository, ServerOptions(config=TORCH_CONFIG)) as endpoints, Client(endpoints.grpc) as client:

            def run(steps: int) -> object:
                return client.sample(
                    context,
                    latents=latents,
                    steps=steps,
                    guidance_scale=GUIDANCE_SCALE,
                    schedule="flow_match",
                    timeout_s=_TIMEOUT_S,
                )

            run(2)
            return self._row(name, chosen, seconds(lambda: run(self._setting.steps), torch.device("cpu")))

    def _row(self, name: str, preset: Preset, took_s: float) -> Row:
        precision = self._setting.served_precision
        evaluations = max(self._setting.steps - 1, 1)  # the schedule's last step has size 0 and is not evaluated
        work = evaluations * GUIDED[0].flop(preset, precision)
        return Row(
            part=PART,
            name=name,
            time_ms=1000 * took_s,
            tflop=work / 1e12,
            roofline_ms=work / 1e9 / self._setting.stopwatch.matmul_tflops(PRECISIONS[precision]),
            note=f"{1000 * took_s / evaluations:.1f} ms an evaluation",
        )
