"""Deviation from the full result against evaluations, through a server: with a tolerance, and with fewer Euler steps instead.

Any weights can be swept, because nothing is measured but the distance between a server's own results.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hunyuan3d_client import Client, Step
from hunyuan3d_client.text_table import aligned

from ..progress import ComparisonWatch, Silent
from . import TRAINED_PROMPTS, embed_prompt
from .quality import Latents, initial_noise

TOLERANCES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.12)
FEWER_STEPS = (13, 17, 25, 33)  # of a schedule of 50; n steps are n - 1 evaluations
SCALES = (1.0, 1.3, 4.0)
PROMPTS = TRAINED_PROMPTS[:18]
NUM_LATENTS, STEPS = 128, 50
_LONGEST_S = 3600.0
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What to sweep, and on which server. context: a .npy file [N, T, 1536] in place of the prompts of `shapes`.

    Raises ValueError for anything else than a tolerance through a server.
    """

    swept: str
    through: str
    url: str
    context: Path | None = None
    num_latents: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.swept != "tolerance":
            raise ValueError(f"--sweep must be tolerance, got {self.swept!r}")
        if self.through != "served":
            raise ValueError(
                f"--through must be served for --sweep, got {self.through!r}\nhint: --through served --url HOST:PORT"
            )


def run(options: SweepOptions, watch: ComparisonWatch | None = None) -> list[Row]:
    """The rows of sweep() for these options. watch: is told of each row.

    Raises the client's errors when the server cannot be reached.
    """
    if options.context is None:
        contexts = {prompt: embed_prompt(prompt) for prompt in PROMPTS}
    else:
        contexts = {str(index): tokens for index, tokens in enumerate(np.load(options.context).astype(np.float16))}
    with Client(options.url, timeout_s=_LONGEST_S) as client:
        found = sweep(client, contexts, num_latents=options.num_latents or NUM_LATENTS, steps=options.steps or STEPS)
        return list(_told(found, watch or Silent()))


def _told(found: Iterable[Row], watch: ComparisonWatch) -> Iterator[Row]:
    settings = len(SCALES) * (len(TOLERANCES) + len(FEWER_STEPS))
    watch.plan(settings, settings)
    watch.begin("the first setting")
    for row in found:
        watch.advance(1)
        watch.finish(
            f"scale {row['scale']:g}, tolerance {row['tolerance']:g}, {row['steps']} steps: "
            f"median deviation {np.median(row['deviation']):.4f}"
        )
        watch.begin("the next setting")
        yield row


def sweep(
    client: Client,
    contexts: Mapping[str, NDArray[np.float16]],
    *,
    scales: Iterable[float] = SCALES,
    tolerances: Sequence[float] = TOLERANCES,
    num_latents: int,
    steps: int,
) -> Iterator[Row]:
    """Samples every context [T, 1536] once without forecasts, then with each tolerance and with fewer steps, from the same noise.

    Yields a row for each scale and setting: `evaluations` and `deviation` (relative L2 of the final latents) of each sample.
    All samples of a setting are on their way together, so the server batches them.
    """
    fewer = [max(2, round(count * steps / 50)) for count in FEWER_STEPS]
    settings: list[Row] = [{"tolerance": tolerance, "steps": steps} for tolerance in tolerances]
    settings += [{"tolerance": 0.0, "steps": count} for count in fewer]
    noise = initial_noise(range(len(contexts)), num_latents)
    for scale in scales:
        full = _drawn(client, contexts, noise, steps=steps, guidance_scale=scale)
        for setting in settings:
            found = _drawn(client, contexts, noise, guidance_scale=scale, **setting)
            yield {"scale": scale, **setting, **_compared(found, full)}


def _drawn(
    client: Client, contexts: Mapping[str, NDArray[np.float16]], noise: Latents, **options: Any
) -> list[tuple[Step, Latents]]:
    def last(context: NDArray[np.float16], start: Latents) -> Step:
        stream = client.stream(context[None], latents=start[None], preview_every=0, **options)
        return _checked(collections.deque(stream, maxlen=1)[0])

    with ThreadPoolExecutor(len(noise)) as pool:
        steps = list(pool.map(last, contexts.values(), noise))
    return [(step, cast(Latents, step.latents)) for step in steps]


def _checked(last: Step) -> Step:
    if last.network_evaluations is None or last.forecast_error is None:
        raise ValueError(
            "the server's sampler must know tolerances, got an older one\nhint: deploy this version's model repository"
        )
    return last


def _compared(found: list[tuple[Step, Latents]], full: list[tuple[Step, Latents]]) -> Row:
    pairs = list(zip(found, full, strict=True))
    return {
        "evaluations": [step.network_evaluations[0] for step, _ in found if step.network_evaluations],
        "forecast_error": [step.forecast_error[0] for step, _ in found if step.forecast_error],
        "deviation": [float(np.linalg.norm(one - whole) / np.linalg.norm(whole)) for (_, one), (_, whole) in pairs],
    }


def table(rows: list[Row]) -> list[str]:
    """The rows as lines."""
    columns = ("scale", "tolerance", "steps", "evaluations", "most", "median deviation", "largest", "forecast error")
    cells: list[tuple[str, ...]] = [columns]
    for row in rows:
        deviation, evaluations = row["deviation"], row["evaluations"]
        cells.append(
            (
                f"{row['scale']:g}",
                f"{row['tolerance']:g}",
                str(row["steps"]),
                f"{np.mean(evaluations):.1f}",
                str(max(evaluations)),
                f"{np.median(deviation):.4f}",
                f"{max(deviation):.4f}",
                f"{np.median(row['forecast_error']):.4f}",
            )
        )
    return ["deviation from the result of all steps", *aligned(cells, indent="  ")]


def draw(rows: list[Row], path: Path) -> None:
    """A picture: median and largest deviation over evaluations, a panel for each scale. Needs matplotlib."""
    from matplotlib.figure import Figure

    scales = list(dict.fromkeys(row["scale"] for row in rows))
    figure = Figure(figsize=(4 * len(scales), 3.4), layout="constrained")
    kinds: dict[str, Callable[[Row], bool]] = {
        "tolerance": lambda row: row["tolerance"] > 0,
        "fewer steps": lambda row: row["tolerance"] == 0,
    }
    for axes, scale in zip(figure.subplots(1, len(scales), sharey=True, squeeze=False)[0], scales, strict=True):
        for (kind, chosen), colour in zip(kinds.items(), ("tab:blue", "tab:orange"), strict=True):
            points = sorted(
                (np.mean(row["evaluations"]), np.median(row["deviation"]), max(row["deviation"]))
                for row in rows
                if row["scale"] == scale and chosen(row)
            )
            evaluations, medians, largest = zip(*points, strict=True)
            axes.plot(evaluations, medians, marker="o", color=colour, label=f"{kind}, median")
            axes.plot(evaluations, largest, marker=".", ls=":", color=colour, label=f"{kind}, largest")
        axes.set(title=f"guidance scale {scale:g}", xlabel="evaluations", yscale="log")
    figure.axes[0].set_ylabel("deviation (relative L2)")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
