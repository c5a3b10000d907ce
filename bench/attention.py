"""Time and peak memory of every attention backend by sequence length. Each pair is measured in its own process.

    python bench/attention.py             prints the table
    python bench/attention.py --document  also writes the table, with a picture of it, into docs/attention.md

Each call has one batch item and 16 heads of 64, without gradients, in float32 on a CPU and float16 on a GPU. The peak is the
memory that a call needs beyond its inputs; the time is that of the fastest of a few calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hunyuan3d_export.attention import BACKENDS, CHUNK_SIZE, Call, PeakMemory, attention, estimate_bytes

LENGTHS = (256, 1024, 4096, 8192)
HEADS, HEAD_DIM = 16, 64
DOCUMENT = Path("docs") / "attention.md"
PICTURE = DOCUMENT.with_suffix(".png")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_MIB = 2**20
_BUDGET_S, _MOST_CALLS = 5.0, 100
# The claims of the description of the two attention designs for L = 4096 in float32. Ratios are relative to `standard`.
CLAIMS = {
    "standard": "scores 1 GiB",
    "chunked": "scores 128 MiB, 1/8",
    "flash": "GPU: time 0.40, memory 0.50",
    "sage": "GPU: time 0.25, memory 0.40",
}
CLAIMED_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Row:
    length: int
    backend: str
    time_s: float
    peak_mib: float | None


def _inputs(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(3))
    return q, k, v


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(backend: str, length: int, device: torch.device) -> Row:
    """Measures in this process: a small call loads the kernels, a second call gives the memory, the further ones the time."""
    attention(*_inputs(64, device), backend=backend)
    inputs = _inputs(length, device)
    _wait(device)
    with PeakMemory(device) as peak:
        attention(*inputs, backend=backend)
        _wait(device)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < _BUDGET_S and len(times) < _MOST_CALLS):
        start = time.perf_counter()
        attention(*inputs, backend=backend)
        _wait(device)
        times.append(time.perf_counter() - start)
    return Row(length, backend, min(times), None if peak.bytes is None else peak.bytes / _MIB)


def _fits(backend: str, length: int, device: torch.device) -> bool:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    q = torch.empty(1, HEADS, length, HEAD_DIM, device="meta", dtype=_inputs(1, device)[0].dtype)
    call = Call(None, None, False, 0.0, CHUNK_SIZE)
    return 1.2 * estimate_bytes(backend, q, q, q, call) < free


def _apart(backend: str, length: int, device: torch.device) -> Row:
    command = [sys.executable, __file__, "--measure", backend, str(length), "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{backend} at L = {length} failed:\n{done.stderr}")
    return Row(**json.loads(done.stdout))


def measure_all(device: torch.device) -> list[Row]:
    """Measures every backend that runs on this machine, at every length that fits into its memory."""
    q, k, v = _inputs(64, device)
    call = Call(None, None, False, 0.0, CHUNK_SIZE)
    with torch.no_grad():
        usable = [name for name, backend in BACKENDS.items() if backend.refusal(q, k, v, call) is None]
    pairs = [(length, name) for length in LENGTHS for name in usable if _fits(name, length, device)]
    console = Console(stderr=True)
    return [_apart(name, length, device) for length, name in track(pairs, "measuring", console=console, transient=True)]


HEADER = ("L", "backend", "time", "x standard", "peak", "x standard", "claimed for L = 4096")


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    standard = {row.length: row for row in rows if row.backend == "standard"}
    lines = []
    for row in rows:
        base = standard.get(row.length)
        peaks = (row.peak_mib, base.peak_mib if base else None)
        lines.append(
            (
                str(row.length),
                row.backend,
                f"{1000 * row.time_s:.1f} ms",
                f"{row.time_s / base.time_s:.2f}" if base else "-",
                "-" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB",
                f"{peaks[0] / peaks[1]:.3f}" if peaks[0] is not None and peaks[1] else "-",
                CLAIMS.get(row.backend, "") if row.length == CLAIMED_LENGTH else "",
            )
        )
    return lines


def draw(rows: list[Row], machine: str) -> None:
    """Draws time and peak memory over L, with logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, marker in zip(BACKENDS, "oxD^v", strict=True):  # different markers, because sdpa and flash may coincide
        own = [row for row in rows if row.backend == name]
        if not own:
            continue
        left.plot([row.length for row in own], [row.time_s for row in own], marker=marker, label=name)
        known = [row for row in own if row.peak_mib is not None]
        floor = 0.1  # MiB, because a logarithmic axis has no zero
        right.plot([row.length for row in known], [max(row.peak_mib or 0, floor) for row in known], marker=marker, label=name)
    for axes, label in ((left, "time of one call, s"), (right, "peak memory beyond the inputs, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="L (queries = keys)", ylabel=label)
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"Attention by backend: 16 heads of 64, {machine}", fontsize=10)
    figure.savefig(PICTURE, dpi=120)


def write_document(rows: list[Row], machine: str) -> None:
    """Replaces the text between the two marks in docs/attention.md, and the picture beside it."""
    draw(rows, machine)
    lines = [f"Measured on {machine}; python bench/attention.py --document writes this table and the picture.", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table(rows)]
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text("\n".join([before + BEGIN, *lines, END]) + after)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, float16, torch {torch.__version__}"
    return f"{torch.get_num_threads()} {platform.machine()} cores, float32, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--document", action="store_true", help=f"write {DOCUMENT} and {PICTURE}")
    parser.add_argument("--measure", nargs=2, metavar=("BACKEND", "L"), help="one measurement in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        backend, length = options.measure
        sys.stdout.write(json.dumps(dataclasses.asdict(measure(backend, int(length), options.device))))
        return
    rows = measure_all(options.device)
    shown = Table(*HEADER, title=f"attention, 16 heads of 64, {describe(options.device)}")
    for cells in table(rows):
        shown.add_row(*cells)
    Console().print(shown)
    if options.document:
        write_document(rows, describe(options.device))


if __name__ == "__main__":
    main()
