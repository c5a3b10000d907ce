"""Throughput, latency and batch size of the sampler under load: closed loop (N callers) and open loop (Poisson arrivals).

python bench/load.py               a small network on the embedded server
python bench/load.py --document    also writes the picture of docs/sampler.md
python bench/load.py --url H:P --metrics H:P --latents 3072 --context 1370    a running server
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import serving
from rich.console import Console
from rich.table import Table

from hunyuan3d_client import AsyncClient
from hunyuan3d_client.errors import Hunyuan3DError
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints

CALLERS = (1, 2, 4, 8, 16)
LOADS = (0.5, 0.8, 1.1)  # shares of the closed loop's best throughput
PICTURE = Path("docs") / "sampler.png"


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one load. offered: the callers (closed loop) or the requests per second (open loop)."""

    loop: str
    offered: float
    done: int
    refused: int
    per_second: float
    batch_rows: float
    p50: float
    p95: float
    p99: float


Sample = Callable[[int], Awaitable[object]]


async def closed(sample: Sample, callers: int, seconds: float) -> tuple[list[float], int]:
    """Each caller sends its next request as soon as it has an answer, until the time is over. Returns (latencies, refused)."""
    end = time.perf_counter() + seconds
    times: list[float] = []

    async def caller(number: int) -> None:
        while (begin := time.perf_counter()) < end:
            await sample(number)
            times.append(time.perf_counter() - begin)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    return times, 0


async def opened(sample: Sample, rate: float, seconds: float) -> tuple[list[float], int]:
    """Requests arrive at random times, even while others wait. Returns (latencies of the answered requests, refused)."""
    arrivals, chance, at = [], random.Random(5), 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        arrivals.append(at)
    times: list[float] = []
    refused = 0

    async def one(number: int, at: float) -> None:
        nonlocal refused
        await asyncio.sleep(at)
        begin = time.perf_counter()
        try:
            await sample(number)
            times.append(time.perf_counter() - begin)
        except Hunyuan3DError:
            refused += 1

    await asyncio.gather(*(one(number, at) for number, at in enumerate(arrivals)))
    return times, refused


async def measure(endpoints: Endpoints, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    context = serving.tokens(options.context)
    async with AsyncClient(endpoints.grpc, retries=0, max_in_flight=1024, timeout_s=600) as client:

        async def sample(seed: int) -> object:
            return await client.sample(context, num_latents=options.latents, steps=options.steps, seed=seed)

        await sample(0)
        best = 0.0
        plan = [("closed", float(callers)) for callers in CALLERS] + [("open", load) for load in LOADS]
        for loop, offered in plan:
            offered = offered if loop == "closed" else offered * best
            before, begin = serving.counters(endpoints), time.perf_counter()
            run = (
                closed(sample, int(offered), options.seconds) if loop == "closed" else opened(sample, offered, options.seconds)
            )
            times, refused = await run
            took, after = time.perf_counter() - begin, serving.counters(endpoints)
            rows_mean = serving.mean(before, after, "batch_rows")
            row = Row(loop, offered, len(times), refused, len(times) / took, rows_mean, **serving.percentiles(times or [0.0]))
            best = max(best, row.per_second)
            serving.say(f"{loop} {offered:.2f}: {row.per_second:.2f}/s, {rows_mean:.1f} rows a call, p95 {row.p95:.2f} s")
            rows.append(row)
    return rows


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draws throughput and rows per call over the number of callers, and latency over the offered load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    callers = [row for row in rows if row.loop == "closed"]
    arrivals = [row for row in rows if row.loop == "open"]
    left.plot([row.offered for row in callers], [row.per_second for row in callers], marker="o")
    middle.plot([row.offered for row in callers], [row.batch_rows for row in callers], marker="o")
    for axes, label in ((left, "samples a second"), (middle, "rows of a denoiser call")):
        axes.set(xscale="log", xlabel="callers (closed loop)", ylabel=label, ylim=(0, None))
        axes.set_xticks(CALLERS, [str(count) for count in CALLERS])
        axes.minorticks_off()
    for name in ("p50", "p95", "p99"):
        right.plot([row.offered for row in arrivals], [getattr(row, name) for row in arrivals], marker="o", label=name)
    right.set(xlabel="arrivals a second (open loop)", ylabel="latency, s", ylim=(0, None))
    right.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[Endpoints]:
    if options.url:
        yield Endpoints(options.url, "", options.metrics, 0)
    else:
        with EmbeddedServer(serving.repository()) as endpoints:
            yield endpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="gRPC address of a running server; default: the embedded one")
    parser.add_argument("--metrics", help="metrics address of that server")
    parser.add_argument("--latents", type=int, default=32, help="L")
    parser.add_argument("--context", type=int, default=16, help="T")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each load")
    parser.add_argument("--document", action="store_true", help=f"write {PICTURE}")
    options = parser.parse_args()
    if bool(options.url) != bool(options.metrics):
        parser.error("--url and --metrics must be given together")
    with server(options) as endpoints:
        rows = asyncio.run(measure(endpoints, options))
    title = f"L {options.latents}, T {options.context}, {options.steps} steps"
    shown = Table("loop", "offered", "done", "refused", "samples/s", "rows a call", "p50 s", "p95 s", "p99 s", title=title)
    for row in rows:
        figures = (row.per_second, row.batch_rows, row.p50, row.p95, row.p99)
        shown.add_row(row.loop, f"{row.offered:.2f}", str(row.done), str(row.refused), *(f"{value:.2f}" for value in figures))
    Console(width=110).print(shown)
    serving.BUILD.mkdir(parents=True, exist_ok=True)
    (serving.BUILD / "load.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    draw(rows, title, PICTURE if options.document else serving.BUILD / "load.png")


if __name__ == "__main__":
    main()
