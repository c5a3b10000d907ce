"""What a long comparison tells about its progress, and how much of it there is: commands/watched.py shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class ComparisonWatch(Protocol):
    """Is told how a comparison goes. Work is a number in any unit that all parts share."""

    def plan(self, parts: int, work: float) -> None:
        """So many parts are to come, with so much work in all."""

    def begin(self, name: str) -> None:
        """The part of this name begins."""

    def advance(self, work: float) -> None:
        """This much more work is done."""

    def finish(self, line: str) -> None:
        """A part is over; the line has its result."""

    def wrote(self, path: Path) -> None:
        """A file was written that stays valid if the comparison stops here."""


class Silent:
    """The watch of a caller who wants to hear nothing."""

    def plan(self, parts: int, work: float) -> None: ...

    def begin(self, name: str) -> None: ...

    def advance(self, work: float) -> None: ...

    def finish(self, line: str) -> None: ...

    def wrote(self, path: Path) -> None: ...
