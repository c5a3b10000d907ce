"""The rows of the check's table, and the jobs that measure them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Skip(Exception):
    """This machine lacks a package or a device that the row needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    roofline_ms: the time that the matrix products alone would take at this device's measured rate.
    memory_mib: the peak of the device's memory: for torch what its allocator held, weights included; for other runtimes what the
    device lost since before they loaded. error: relative L2 error against float32 torch. note: a ratio, or the reason why nothing was measured.
    """

    part: str
    name: str
    time_ms: float | None = None
    tflop: float | None = None
    roofline_ms: float | None = None
    memory_mib: float | None = None
    error: float | None = None
    tolerance: float | None = None
    note: str = ""
    failed: bool = False

    @property
    def passed(self) -> bool:
        within = self.error is None or self.tolerance is None or self.error <= self.tolerance
        return within and not self.failed


@dataclasses.dataclass(frozen=True)
class Job:
    """A row that is still to be measured: `run` returns it or raises Skip."""

    part: str
    name: str
    run: Callable[[], Row]

    def measured(self) -> Row:
        """The row, or a row that says why there is none."""
        try:
            return self.run()
        except Skip as reason:
            return self.skipped(str(reason))
        except Exception as error:  # the other rows must still run: this machine may not be available again
            logger.warning("%s, %s failed", self.part, self.name, exc_info=error)
            return self.failed((str(error) or repr(error)).splitlines()[0])

    def skipped(self, reason: str) -> Row:
        return Row(part=self.part, name=self.name, note=f"skipped: {reason}")

    def failed(self, reason: str) -> Row:
        return Row(part=self.part, name=self.name, note=f"failed: {reason}", failed=True)


HEADER = ("part", "what", "ms", "TFLOP", "roofline ms", "of roofline", "MiB", "error", "tolerance", "")


def cells(row: Row) -> tuple[str, ...]:
    """The row as one text per column of HEADER."""
    share = "" if row.time_ms is None or row.roofline_ms is None else f"{row.roofline_ms / row.time_ms:.0%}"
    verdict = "" if row.passed or row.failed else "FAILED "
    return (
        row.part,
        row.name,
        _number(row.time_ms, ".2f"),
        _number(row.tflop, ".3f"),
        _number(row.roofline_ms, ".2f"),
        share,
        _number(row.memory_mib, ".0f"),
        _number(row.error, ".1e"),
        _number(row.tolerance, ".0e"),
        verdict + row.note,
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: list[Row]) -> str:
    """The rows as a table of plain text."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    left = (0, 1, len(HEADER) - 1)
    texts = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([texts[0].rstrip(), "-" * len(texts[0].rstrip()), *(text.rstrip() for text in texts[1:])]) + "\n"
