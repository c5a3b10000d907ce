"""The report of a check: JSON, a table and, where matplotlib is installed, a picture, all written anew after each row or group."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from ..files import atomic_path
from .rows import Row, cells, table

logger = logging.getLogger(__name__)
_MODULE = "hunyuan3d_export.gpu_check.report"
_PICTURED = ("evaluation", "SDPA kernel", "sample")


class Report:
    """Rows in their order. path: the JSON file; the table and the picture lie beside it with the endings .txt and .png."""

    def __init__(self, path: Path, machine: Mapping[str, str]) -> None:
        self._path = path
        self._machine = machine
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Keeps the row and writes the files, so that an interrupted check leaves the rows it has measured."""
        self.rows.append(row)
        logger.info("%s", " | ".join(filter(None, cells(row))))
        content = {"machine": self._machine, "rows": [{**dataclasses.asdict(row), "passed": row.passed} for row in self.rows]}
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        with atomic_path(self._path.with_suffix(".txt")) as temporary:
            temporary.write_text(self.text())

    def text(self) -> str:
        """The machine in one line, then the table."""
        return f"{', '.join(f'{name} {value}' for name, value in self._machine.items())}\n\n{table(self.rows)}"

    def draw(self) -> None:
        """Draws the picture; without matplotlib it says so once at the end of the log."""
        try:
            draw(self._path)
        except ModuleNotFoundError as error:
            logger.info("no picture: %s is missing; elsewhere: python -m %s %s", error.name, _MODULE, self._path)


def draw(path: Path) -> Path:
    """Draws the measured times of a JSON report, each with its roofline. Returns the PNG file. Raises ModuleNotFoundError."""
    from matplotlib.figure import Figure

    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if row["part"] in _PICTURED and row["time_ms"]]
    figure = Figure(figsize=(11, 1.5 + 0.22 * max(len(rows), 4)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [row["time_ms"] for row in rows], color="#4878a8", label="measured")
    axes.barh(places, [row["roofline_ms"] or 0 for row in rows], height=0.35, color="#e0a030", label="roofline")
    axes.set_yticks(places, [f"{row['part']}: {row['name']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    if rows:
        axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.set_title(content["machine"]["device"])
    axes.legend()
    with atomic_path(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path.with_suffix(".png")


if __name__ == "__main__":
    sys.stdout.write(f"{draw(Path(sys.argv[1]))}\n")
