"""Tables as plain lines, the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]], *, indent: str = "") -> list[str]:
    """A line for each row, with its cells in columns two spaces apart. A column that is empty in all rows is left out."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    kept = [index for index, width in enumerate(widths) if width]
    return [indent + "  ".join(row[index].ljust(widths[index]) for index in kept).rstrip() for row in cells]
