"""The cost of serving: served samples against the same loop in process, and the sampler's own time with an instant denoiser.

The served and the in-process samples take turns within one run. Both the median ratio of the pairs and the ratio of the fastest
samples must stay within the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import serving
import torch
import tritonclient.grpc
from rich.console import Console
from rich.table import Table

from hunyuan3d_client import AsyncClient, Client, Step, Stream, contract, noise
from hunyuan3d_export.dit.reference_sampler import OnnxDenoiser, sigmas
from hunyuan3d_export.dit.reference_sampler import sample as in_process
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints

BATCH = 8
MOST_OVERHEAD, LEAST_THROUGHPUT = 1.05, 0.95
V2_0 = {"latents": 3072, "context": 1370}


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def loop(denoiser: OnnxDenoiser, context: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """The trajectory of a served sample, computed in this process without a server."""
    times = sigmas("flow_match", steps)
    result = in_process(
        denoiser, torch.from_numpy(context), torch.from_numpy(start), times, guidance_scale=serving.SCALE, path="guided"
    )
    return result.numpy()


def overhead(endpoints: Endpoints, denoiser: OnnxDenoiser, *, latents: int, tokens: int, rounds: int) -> dict[str, float]:
    """Compares a served 50-step sample with the loop in this process."""
    context, start = serving.tokens(tokens), noise(1, latents)
    with Client(endpoints.grpc, timeout_s=600) as client, tritonclient.grpc.InferenceServerClient(endpoints.grpc) as raw:

        def served(steps: int = 50) -> np.ndarray:
            return client.sample(context, latents=start, steps=steps, guidance_scale=serving.SCALE)

        few = served(6)
        difference = np.linalg.norm(few - loop(denoiser, context, start, 6)) / np.linalg.norm(few)
        alone, behind, inside = [], [], []
        for _ in range(rounds):
            alone.append(timed(lambda: loop(denoiser, context, start, 50)))
            before = _model_s(raw)
            behind.append(timed(served))
            inside.append(behind[-1] / (_model_s(raw) - before))
            serving.say(f"  served {behind[-1]:.2f} s, in process {alone[-1]:.2f} s")
    return {
        "evaluation_ms": 1000 * min(alone) / 49,
        "fastest served / fastest in process": min(behind) / min(alone),
        "median of pairs": statistics.median(b / a for a, b in zip(alone, behind, strict=True)),
        "served / time in the denoiser": min(inside),
        "difference": float(difference),
    }


async def independent(url: str, contexts: list[np.ndarray], latents: int, steps: int) -> None:
    """Runs eight loops that each call the denoiser step by step, so only Triton's dynamic batcher can batch their calls."""
    times = sigmas("flow_match", steps)
    async with AsyncClient(url, timeout_s=600) as client:

        async def one(seed: int, context: np.ndarray) -> None:
            state = noise(seed, latents)
            for now, later in zip(times[:-2], times[1:-1], strict=True):
                state = state + np.float32(later - now) * await client.denoise(
                    state, now, context, guidance_scale=serving.SCALE
                )

        await asyncio.gather(*(one(seed, context) for seed, context in enumerate(contexts)))


async def together(url: str, contexts: list[np.ndarray], latents: int, steps: int) -> None:
    async with AsyncClient(url, timeout_s=600) as client:
        options = {"num_latents": latents, "steps": steps, "guidance_scale": serving.SCALE}
        await asyncio.gather(*(client.sample(context, seed=seed, **options) for seed, context in enumerate(contexts)))


def throughput(
    endpoints: Endpoints, denoiser: OnnxDenoiser, *, latents: int, tokens: int, steps: int, rounds: int
) -> dict[str, float]:
    """Compares three ways to draw eight samples: the sampler, a loop in process at batch 8, and independent client loops."""
    contexts = [serving.tokens(tokens, seed=seed) for seed in range(BATCH)]
    stacked, start = np.concatenate(contexts), noise(0, latents, batch=BATCH)
    alone, served, baseline, rows = [], [], [], []
    asyncio.run(together(endpoints.grpc, contexts, latents, 3))
    loop(denoiser, stacked, start, 3)
    for _ in range(rounds):
        alone.append(timed(lambda: loop(denoiser, stacked, start, steps)))
        before = serving.counters(endpoints)
        served.append(timed(lambda: asyncio.run(together(endpoints.grpc, contexts, latents, steps))))
        rows.append(serving.mean(before, serving.counters(endpoints), "batch_rows"))
        baseline.append(timed(lambda: asyncio.run(independent(endpoints.grpc, contexts, latents, steps))))
        figures = f"{served[-1]:.2f} s ({rows[-1]:.1f} rows a call), dynamic batcher {baseline[-1]:.2f} s"
        serving.say(f"  in process {alone[-1]:.2f} s, sampler {figures}")
    return {
        "sampler / in process": min(alone) / min(served),
        "dynamic batcher / in process": min(alone) / min(baseline),
        "rows a call": statistics.median(rows),
    }


def own_cost(*, hold_context: bool, callers: int, steps: int = 60) -> dict[str, float]:
    """Milliseconds of one step with v2-0's tensors and a denoiser that returns at once, in total and by part of the work."""
    folder = serving.instant_repository(name=f"instant-{hold_context}".lower(), hold_context=hold_context)
    with EmbeddedServer(folder) as endpoints, tritonclient.grpc.InferenceServerClient(endpoints.grpc) as raw:
        contexts = [serving.tokens(V2_0["context"], seed=seed) for seed in range(callers)]
        asyncio.run(together(endpoints.grpc, contexts, V2_0["latents"], 4))
        before, model_before = serving.counters(endpoints), _model_s(raw)
        with Client(endpoints.grpc, timeout_s=600) as client, ThreadPoolExecutor(callers) as pool:
            options = {"num_latents": V2_0["latents"], "steps": steps, "preview_every": 0}
            begins, ends = zip(
                *pool.map(lambda context: _first_and_last(client.stream(context, **options)), contexts), strict=True
            )
        after, model_after = serving.counters(endpoints), _model_s(raw)
    calls = after["evaluation_seconds_count"] - before["evaluation_seconds_count"]
    evaluation = (after["evaluation_seconds_sum"] - before["evaluation_seconds_sum"]) / calls
    denoiser = (model_after - model_before) / calls
    wall = (max(ends) - min(begins)) / calls
    return {
        "step": 1000 * wall,
        "stack, copy and hop": 1000 * (evaluation - denoiser),
        "denoiser": 1000 * denoiser,
        "stepper and answers": 1000 * max(0.0, wall - evaluation),
        "rows a call": serving.mean(before, after, "batch_rows"),
    }


def _first_and_last(steps: Stream[Step]) -> tuple[float, float]:
    """When the first and the last step of a trajectory arrived."""
    times = [time.perf_counter() for _ in steps]
    return times[0], times[-1]


def _model_s(raw: tritonclient.grpc.InferenceServerClient) -> float:
    """Seconds that all executions of the denoiser have taken so far."""
    (found,) = raw.get_inference_statistics(contract.DIT_GUIDED).model_stats
    return found.inference_stats.compute_infer.ns / 1e9  # the sampler stacks its rows into one request per execution


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of each measurement")
    # Single rounds of either side differ by 9 % here, so the fastest of only a few rounds would depend on luck.
    rounds, pairs = (1, 1) if parser.parse_args().quick else (3, 8)
    denoiser = OnnxDenoiser(serving.artifacts())
    report: dict[str, dict[str, float]] = {}
    with EmbeddedServer(serving.repository()) as endpoints:
        serving.say("a 50-step sample, served and in process")
        report["one caller"] = overhead(endpoints, denoiser, latents=160, tokens=64, rounds=pairs)
        serving.say("eight samples at once")
        report["eight callers"] = throughput(endpoints, denoiser, latents=128, tokens=64, steps=9, rounds=rounds)
    for callers in (1, BATCH):
        serving.say(f"the sampler's own cost, v2-0's tensors, {callers} at once")
        report[f"own cost, {callers} at once"] = own_cost(hold_context=True, callers=callers)
        report[f"own cost, {callers} at once, context copied at each step"] = own_cost(hold_context=False, callers=callers)
    shown = Table("measured", "figure", "value")
    for name, figures in report.items():
        for figure, value in figures.items():
            shown.add_row(name, figure, f"{value:.3g}" if value < 0.01 else f"{value:.2f}")
    Console(width=120).print(shown)
    (serving.BUILD / "sampler_cost.json").write_text(json.dumps(report, indent=2) + "\n")
    ratios = (report["one caller"][name] for name in ("median of pairs", "fastest served / fastest in process"))
    passed = max(ratios) <= MOST_OVERHEAD
    return 0 if passed and report["eight callers"]["sampler / in process"] >= LEAST_THROUGHPUT else 1


if __name__ == "__main__":
    sys.exit(main())
