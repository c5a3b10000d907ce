"""The client's overhead: a denoise round trip with v2-0's tensors, compared with raw tritonclient.

The calls of both take turns within one run. The model answers with its latents at once, so that the transport takes nearly
all of the time. With a real denoiser the ratios are nearer to 1.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from rich.console import Console
from rich.table import Table

from hunyuan3d_client import Client, contract
from hunyuan3d_export.server.embedded import EmbeddedServer

BUILD = Path("build") / "bench"
_ROUNDS = 200
_WARM_UP = 20
_MOST_OF_RAW = 1.05
_LEAST_GAIN = 1.3
_MODEL = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        latents = [pb_utils.get_input_tensor_by_name(request, "latents").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("velocity", array)]) for array in latents]
"""


def _repository() -> Path:
    """hunyuan3d_dit with its deployed config, which has no queue delay, and with a model that answers at once."""
    repository, source = BUILD / "client-repository", Path("model_repository") / contract.DIT
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(source, repository / contract.DIT, ignore=shutil.ignore_patterns("1"))
    config = (repository / contract.DIT / "configs" / "cpu.pbtxt").read_text()
    assert "max_queue_delay" not in config, "a model that waits for a batch would be measured with its wait"
    version = repository / contract.DIT / "1"
    version.mkdir()
    (version / "model.py").write_text(_MODEL)
    (version / "model.onnx").touch()  # the server's launcher loads a model only if it finds this file
    return repository


def _inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "latents": random.standard_normal((1, 3072, contract.LATENT_CHANNELS), np.float32),
        "t": np.full((1, 1), 0.5, np.float32),
        "context": random.standard_normal((1, 1370, contract.CONTEXT_WIDTH), np.float32).astype(np.float16),
    }


def _raw(client: triton.InferenceServerClient, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A round trip written in the way of the vendor's examples."""
    tensors = []
    for spec in contract.denoiser().inputs:
        tensor = triton.InferInput(spec.name, list(arrays[spec.name].shape), spec.dtype)
        tensors.append(tensor.set_data_from_numpy(arrays[spec.name]))
    return client.infer(contract.DIT, tensors).as_numpy("velocity")


def _settle_malloc() -> None:
    """Free one large block. From then on glibc keeps blocks of a message's size instead of mapping them anew each time.

    Otherwise raw tritonclient, which copies most, takes twice as long in some processes, by chance.
    """
    np.ones(30 << 20, np.uint8)


def _medians(arms: Mapping[str, Callable[[], np.ndarray]], expected: np.ndarray) -> dict[str, float]:
    """The median seconds of each arm. The arms take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_ROUNDS):
        for name, call in arms.items():
            started = time.perf_counter()
            velocity = call()
            times[name].append(time.perf_counter() - started)
            assert np.array_equal(velocity, expected), name
    return {name: statistics.median(taken[_WARM_UP:]) for name, taken in times.items()}


def main() -> int:
    arrays = _inputs()
    _settle_malloc()
    given = arrays["latents"], 0.5, arrays["context"]
    with (
        EmbeddedServer(_repository()) as endpoints,
        triton.InferenceServerClient(endpoints.grpc) as raw,
        Client(endpoints.grpc, shared_memory=False) as client,
        Client(endpoints.grpc, shared_memory=True) as shared,
    ):
        arms = {
            "raw tritonclient": lambda: _raw(raw, arrays),
            "client": lambda: client.denoise(*given),
            "client, shared memory": lambda: shared.denoise(*given),
        }
        medians = _medians(arms, arrays["latents"])
    table = Table("denoise round trip, v2-0's tensors", "median ms", "/ raw")
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:.2f}", f"{median / medians['raw tritonclient']:.2f}")
    Console().print(table)
    overhead = medians["client"] / medians["raw tritonclient"]
    gain = medians["client"] / medians["client, shared memory"]
    Console().print(f"client / raw {overhead:.3f} (at most {_MOST_OF_RAW}), shared memory {gain:.2f}x (at least {_LEAST_GAIN})")
    (BUILD / "client.json").write_text(
        json.dumps({"medians_s": medians, "client/raw": overhead, "gain": gain}, indent=2) + "\n"
    )
    return 0 if overhead <= _MOST_OF_RAW and gain >= _LEAST_GAIN else 1


if __name__ == "__main__":
    sys.exit(main())
