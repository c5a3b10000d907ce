"""An ONNX graph on ONNX Runtime's CPU kernels. Knows nothing of Triton."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnxruntime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """threads: of one evaluation, 0 for every core."""

    threads: int


def open_graph(path: Path, options: Options) -> onnxruntime.InferenceSession:
    """Raises FileNotFoundError when the graph is not deployed."""
    if not path.is_file():
        raise FileNotFoundError(f"graph must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --artifacts DIR")
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    # Threads spin from one operator to the next; between evaluations they would take the cores from the server and the sampler,
    # whose turn it is then.
    session_options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
    session_options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
