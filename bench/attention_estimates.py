"""Measured against estimated memory of every attention backend and form of call on a CPU, all in one process of its own.

    python bench/attention_estimates.py             prints the table
    python bench/attention_estimates.py --document  also writes the table into docs/attention.md

Each call has one batch item and 16 heads of 64. The peak is that of the forward pass, beyond the call's inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hunyuan3d_export.attention import BACKENDS, CHUNK_SIZE, Call, PeakMemory, attention, estimate_bytes

QUERIES, KEYS = 1024, 1536
HEADS, HEAD_DIM = 16, 64
DOCUMENT = Path("docs") / "attention.md"
BEGIN, END = "<!-- estimated: begin -->", "<!-- estimated: end -->"
MOST_RATIO = 1.5
BACKEND_NAMES = ("sdpa", "flash", "chunked", "standard")  # sage needs CUDA
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of call. mask and bias name axes, such as "Lq Lk"; the mask is bool unless `additive`.

    gradients: "" (none), "q k v", or "q k v bias".
    """

    mask: str = ""
    bias: str = ""
    additive: bool = False
    causal: bool = False
    dropout: float = 0.0
    gradients: str = ""
    dtype: str = "float32"
    bias_dtype: str = ""

    def __str__(self) -> str:
        words = [
            f"{'additive' if self.additive else 'bool'} mask [{self.mask.replace(' ', ', ')}]" if self.mask else "",
            f"{self.bias_dtype} bias [{self.bias.replace(' ', ', ')}]".strip() if self.bias else "",
            "causal" if self.causal else "",
            "dropout" if self.dropout else "",
            f"gradients of {self.gradients.replace(' ', ', ')}" if self.gradients else "",
        ]
        return f"{self.dtype}: {', '.join(word for word in words if word) or 'nothing else'}"

    def inputs(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v and the further arguments of attention()."""
        sizes = {"B": 1, "H": HEADS, "Lq": queries, "Lk": keys, "1": 1}
        dtype = getattr(torch, self.dtype)
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM).to(dtype) for length in (queries, keys, keys))
        arguments: dict[str, Any] = {"causal": self.causal, "dropout": self.dropout}
        if self.mask:
            keep = torch.rand([sizes[axis] for axis in self.mask.split()]) < 0.9
            arguments["mask"] = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -torch.inf) if self.additive else keep
        if self.bias:
            shape = [sizes[axis] for axis in self.bias.split()]
            arguments["bias"] = torch.randn(shape).to(getattr(torch, self.bias_dtype or self.dtype))
        named = {"q": q, "k": k, "v": v, **arguments}
        for name in self.gradients.split():
            named[name].requires_grad_()
        return q, k, v, arguments


_ALL = "B H Lq Lk"
FORMS = (
    Form(),
    Form(causal=True),
    Form(mask="B Lk"),
    Form(mask="Lq Lk"),
    Form(mask=_ALL),
    Form(mask="Lq Lk", additive=True),
    Form(mask=_ALL, additive=True),
    Form(bias="Lk"),
    Form(bias="H Lq Lk"),
    Form(bias="H Lq Lk", causal=True),
    Form(bias="H Lq Lk", mask="B Lk"),
    Form(bias="H Lq Lk", mask="Lq Lk", causal=True),
    Form(dropout=0.1),
    Form(dropout=0.1, causal=True),
    Form(dropout=0.1, mask=_ALL),
    Form(dropout=0.1, bias="H Lq Lk"),
    Form(gradients="q k v"),
    Form(gradients="q k v", mask="B Lk"),
    Form(gradients="q k v", mask=_ALL),
    Form(gradients="q k v bias", bias="Lk"),
    Form(gradients="q k v bias", bias="H Lq Lk"),
    Form(gradients="q k v bias", bias="H Lq Lk", mask="B Lk"),
    Form(gradients="q k v", dropout=0.1),
    Form(gradients="q k v", dropout=0.1, mask=_ALL),
    *(
        Form(dtype=dtype, **options)
        for dtype in ("bfloat16", "float16")
        for options in ({}, {"mask": _ALL}, {"bias": "H Lq Lk", "bias_dtype": "float32"}, {"dropout": 0.1})
    ),
    Form(dtype="float64"),
    Form(dtype="float64", mask=_ALL),
    Form(dtype="float64", dropout=0.1),
)


@dataclasses.dataclass(frozen=True)
class Row:
    form: str
    backend: str
    measured_bytes: int | None
    estimated_bytes: int

    @property
    def ratio(self) -> float | None:
        """How many times larger one number is than the other, at least 1, or None where nothing was measured."""
        pair = (self.measured_bytes, self.estimated_bytes)
        return None if pair[0] is None else max(pair[0], 1) / pair[1] if pair[0] > pair[1] else pair[1] / max(pair[0], 1)


def measure(form: Form, backend: str, queries: int, keys: int) -> Row | None:
    """Measures in this process, or returns None where the backend does not take the call."""
    with torch.set_grad_enabled(bool(form.gradients)):
        for sizes in ((64, 64), (queries, keys)):  # the first call loads kernels and their buffers
            q, k, v, arguments = form.inputs(*sizes)
            call = _call(arguments, *sizes)
            if BACKENDS[backend].refusal(q, k, v, call) is not None:
                return None
            estimated = estimate_bytes(backend, q, k, v, call)
            with PeakMemory(q.device) as peak:
                attention(q, k, v, backend=backend, **arguments)
    return Row(str(form), backend, peak.bytes, estimated)


def _call(arguments: dict[str, Any], queries: int, keys: int) -> Call:
    mask = arguments.get("mask")
    if mask is not None:
        mask = (
            mask[:, None, None]
            if mask.shape == (1, keys) and queries > 1
            else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        )
    return Call(arguments.get("bias"), mask, arguments["causal"], arguments["dropout"], CHUNK_SIZE)


def measure_all(queries: int, keys: int) -> list[Row]:
    """Measures every form on every backend that takes it, in a new process.

    The process returns every block of more than 64 KiB to the system at once, because memory that a process keeps and uses
    again would not be counted.
    """
    command = [sys.executable, __file__, "--measure", str(queries), str(keys)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr}")
    return [Row(**fields) for fields in json.loads(done.stdout)]


HEADER = ("call", *BACKEND_NAMES)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line for each form: measured and estimated MiB for each backend, or a dash where the backend refuses the call."""
    cells = {(row.form, row.backend): _cell(row) for row in rows}
    forms = dict.fromkeys(row.form for row in rows)
    return [(form, *(cells.get((form, name), "-") for name in BACKEND_NAMES)) for form in forms]


def _cell(row: Row) -> str:
    measured = "?" if row.measured_bytes is None else f"{row.measured_bytes / _MIB:.0f}"
    return f"{measured} / {row.estimated_bytes / _MIB:.0f}"


def worst(rows: list[Row]) -> float:
    return max(row.ratio for row in rows if row.ratio is not None)


def write_document(rows: list[Row], sizes: tuple[int, int]) -> None:
    """Replaces the text between the two marks in docs/attention.md."""
    lines = [
        f"{sizes[0]} queries, {sizes[1]} keys, torch {torch.__version__}: MiB measured / MiB estimated; the two differ by a factor of",
        f"at most {worst(rows):.2f}. `python bench/attention_estimates.py --document` writes this table.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cells) + " |" for cells in table(rows)),
    ]
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text("\n".join([before + BEGIN, *lines, END]) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", action="store_true", help=f"write the table into {DOCUMENT}")
    parser.add_argument("--measure", nargs=2, type=int, metavar=("LQ", "LK"), help="measure in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        found = [measure(form, name, *options.measure) for form in FORMS for name in BACKEND_NAMES]
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in found if row is not None]))
        return
    rows = measure_all(QUERIES, KEYS)
    shown = Table(*HEADER, title=f"MiB measured / estimated, {QUERIES} queries, {KEYS} keys; worst factor {worst(rows):.2f}")
    for cells in table(rows):
        shown.add_row(*cells)
    Console().print(shown)
    if options.document:
        write_document(rows, (QUERIES, KEYS))
    if worst(rows) > MOST_RATIO:
        raise SystemExit(f"the factor between measured and estimated must be at most {MOST_RATIO}, got {worst(rows):.2f}")


if __name__ == "__main__":
    main()
