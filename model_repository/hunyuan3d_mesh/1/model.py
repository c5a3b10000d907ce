"""Triton's side of the mesh model: it takes latents, tells how far it is, and sends the mesh file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import mesh_request
import numpy as np
import parameters
import triton_python_backend_utils as pb_utils
from decoding import DONE, Decoder, MeshFile, Progress, until
from mesh_metrics import MeshMetrics
from mesh_settings import MeshSettings
from network_calls import NetworkCalls
from outcomes import outcome
from streaming import Drain, Stream, input_tensors, log_to_triton
from turns import Turns

_PROGRESS = ("stage", "refinement", "refinements", "evaluations")


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        try:
            self._settings = parameters.parse(MeshSettings, parameters.of_config(config))
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        log_to_triton()
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._metrics = MeshMetrics(pb_utils.MetricFamily)
        self._networks = NetworkCalls(pb_utils, self._settings.evaluation_timeout_s)
        self._threads = ThreadPoolExecutor(self._settings.max_decodes, "mesh")
        self._decoder = Decoder(self._networks, self._settings, self._metrics, self._threads)
        self._turns = Turns(
            running=self._settings.max_decodes,
            queued=self._settings.max_queued,
            timeout_s=self._settings.queue_timeout_s,
            changed=self._metrics.load,
        )
        self._drain = Drain()
        self._running: set[asyncio.Task] = set()
        self._calls: ThreadPoolExecutor | None = None

    async def execute(self, requests: list) -> None:
        loop = asyncio.get_running_loop()
        if self._calls is None:
            # pb_utils waits for each call between models in a thread of the loop's own pool, which by default has six on two cores.
            self._calls = ThreadPoolExecutor(self._settings.field_calls + self._settings.max_decodes, "calls")
            loop.set_default_executor(self._calls)
        for request in requests:
            # Not awaited here, because the next request must not wait for the end of this one.
            task = loop.create_task(self._answer(request, _Stream(request)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, request: object, stream: _Stream) -> None:
        try:
            mesh = await self._decode(request, stream)
            stream.finish(mesh)
        except Exception as error:  # only this request fails
            self._metrics.ended(outcome(error))
            with contextlib.suppress(Exception):  # the client may be gone
                stream.fail(error)
        else:
            self._metrics.decoded(mesh)
            self._metrics.ended("done")

    async def _decode(self, request: object, stream: _Stream) -> MeshFile:
        self._drain.check("meshes")
        latents, wanted = mesh_request.decode(input_tensors(request, self._inputs), self._settings.defaults)
        self._networks.check_ready()
        in_time = until(time.monotonic() + self._settings.total_timeout_s, self._settings.total_timeout_s)

        def check() -> None:
            in_time()
            if (reason := stream.cancelled()) is not None:
                raise reason

        async with self._turns.turn(check):
            return await self._decoder.decode(latents, wanted, stream, check)

    def finalize(self) -> None:
        for threads in (self._threads, self._calls):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)


class _Stream(Stream):
    """Sends the responses of one request; implements decoding.Sink."""

    def __init__(self, request: object) -> None:
        super().__init__(request)
        self._wants_progress = bool(set(_PROGRESS) & set(self.requested))
        self._last = Progress(DONE)

    def progress(self, progress: Progress) -> None:
        self._last = progress
        if self._wants_progress:
            self.send(_progress_tensors(progress))

    def finish(self, mesh: MeshFile) -> None:
        facts = mesh.statistics
        last = Progress(DONE, self._last.refinements, self._last.refinements, facts["evaluations"])
        outputs = [
            *_progress_tensors(last),
            pb_utils.Tensor("mesh", np.frombuffer(mesh.data, np.uint8)),
            _text("mesh_format", mesh.format),
            _text("statistics", json.dumps(facts)),
        ]
        self.send(outputs, final=True)
        self.done(
            f"{mesh.format} of {facts['faces']} faces, resolution {facts['resolution']}, {facts['evaluations']} evaluations"
        )


def _progress_tensors(progress: Progress) -> list[object]:
    return [
        _text("stage", progress.stage),
        pb_utils.Tensor("refinement", np.array([progress.refinement], np.int32)),
        pb_utils.Tensor("refinements", np.array([progress.refinements], np.int32)),
        pb_utils.Tensor("evaluations", np.array([progress.evaluations], np.int64)),
    ]


def _text(name: str, text: str) -> object:
    return pb_utils.Tensor(name, np.array([text.encode()], np.object_))
