"""What a benchmark measures: rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Timing

NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True)
class Run:
    """How a benchmark is to run: at a glance or in full, and where it may leave files."""

    quick: bool
    folder: Path
    photos: Path | None = None
    """A folder of photographs, for the benchmarks that train on some."""
    minutes: float | None = None
    """How long those that take an hour, and can go on later, may begin something new."""

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an input: at a glance a small one, of as many axes."""
        return (2, 4, *[8] * (len(full) - 2)) if self.quick else full


@dataclass(frozen=True)
class Row:
    """One measured figure, what it stands against, and what is promised of it."""

    work: str
    size: str
    what: str
    median: float
    low: float | None = None  # the middle half, unless the benchmark says else
    high: float | None = None
    unit: str = "s"
    against: str | None = None
    base: float | None = None
    """The median of what it stands against."""
    at_most: float | None = None
    """The promise: of the ratio, or of the median where there is nothing to divide by."""
    moved: int | None = None
    """Bytes that the work has to read and write, however it is done."""
    limit: float | None = None
    """The median that memory allows, in the row's unit."""

    @property
    def ratio(self) -> float | None:
        """The median over that of what it stands against."""
        return None if self.base is None else self.median / self.base

    @property
    def met(self) -> bool | None:
        """Whether the promise is kept."""
        figure = self.median if self.ratio is None else self.ratio
        return None if self.at_most is None else figure <= self.at_most

    @property
    def reached(self) -> float | None:
        """The fraction of what memory allows."""
        return None if self.limit is None else self.limit / self.median


def rows(
    work: str,
    size: str,
    timings: Mapping[str, Timing],
    against: str,
    *,
    at_most: Mapping[str, float] = NOTHING,
    moved: Mapping[str, int] = NOTHING,
    limits: Mapping[str, float] = NOTHING,
) -> list[Row]:
    """Return a row for each function of :func:`compare`; promises and limits are by name."""
    return [
        Row(
            work,
            size,
            what,
            *timing,
            against=None if what == against else against,
            base=None if what == against else timings[against].median,
            at_most=at_most.get(what),
            moved=moved.get(what),
            limit=limits.get(what),
        )
        for what, timing in timings.items()
    ]
