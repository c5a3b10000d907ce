"""What forecasts save: eight served 50-step samples at once, with and without a tolerance, by a denoiser that takes 100 ms.

The two kinds take turns within one run. The ratio of their times must be within 1.1 times the ratio of their evaluations.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import serving

from hunyuan3d_client import Client, Step
from hunyuan3d_export.server.embedded import EmbeddedServer

CALLERS, STEPS = 8, 50
MOST_OVERHEAD = 1.1


def drawn(client: Client, *, latents: int, tolerance: float) -> tuple[float, float]:
    """Seconds for eight samples at once, and the evaluations of the sample that took most."""
    contexts = [serving.tokens(64, seed=seed) for seed in range(CALLERS)]
    begin = time.perf_counter()
    options = {"num_latents": latents, "steps": STEPS, "guidance_scale": serving.SCALE, "tolerance": tolerance}

    def last(seed: int) -> Step:
        return collections.deque(client.stream(contexts[seed], seed=seed, preview_every=0, **options), maxlen=1)[0]

    with ThreadPoolExecutor(CALLERS) as pool:
        steps = list(pool.map(last, range(CALLERS)))
    elapsed = time.perf_counter() - begin
    return elapsed, max(max(step.network_evaluations or ()) for step in steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--latents", type=int, default=512, help="L of each sample")
    parser.add_argument("--delay-s", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    overheads = []
    with EmbeddedServer(serving.instant_repository(name="delayed", hold_context=True, delay_s=options.delay_s)) as endpoints:
        with Client(endpoints.grpc, timeout_s=600) as client:
            drawn(client, latents=options.latents, tolerance=options.tolerance)
            for _ in range(options.rounds):
                full_s, full = drawn(client, latents=options.latents, tolerance=0.0)
                saved_s, saved = drawn(client, latents=options.latents, tolerance=options.tolerance)
                overheads.append((saved_s / full_s) / (saved / full))
                serving.say(
                    f"{full_s:.2f} s with {full} evaluations, {saved_s:.2f} s with {saved}: the ratio of times is "
                    f"{overheads[-1]:.3f} of that of evaluations"
                )
    return 0 if statistics.median(overheads) <= MOST_OVERHEAD else 1


if __name__ == "__main__":
    sys.exit(main())
