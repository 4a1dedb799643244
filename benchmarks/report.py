"""Tables of measured ratios, on the screen and in ``benchmarks/results``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

from benchmarks.timing import Timing

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Say what ran this, and when."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {date.today()}"
    )


def rows(case: str, timings: Mapping[str, Timing], against: str) -> list[str]:
    """Return a Markdown row per function: milliseconds, spread, ratio of the medians."""
    base = timings[against].median
    return [
        f"| {case} | {name} | {t.median * 1e3:.3f} | {t.low * 1e3:.3f} to {t.high * 1e3:.3f} "
        f"| {t.median / base:.3f} |"
        for name, t in timings.items()
    ]


def write(name: str, lines: list[str], *, quick: bool) -> None:
    """Print a table; keep it, unless it was a quick look."""
    text = "\n".join(
        [
            f"`python -m benchmarks.{name}` on {machine()}.",
            "",
            "| case | what | median, ms | middle half, ms | ratio |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )
    print(text)
    if not quick:
        (RESULTS / f"{name.removeprefix('bench_')}.md").write_text(text)
