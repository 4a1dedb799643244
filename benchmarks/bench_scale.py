"""Time and memory of the recalibration against batches, channels and layers: straight lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnstats
from benchmarks import command
from benchmarks.machine import device
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row, Run
from benchmarks.timing import Timing, compare

Case = tuple[nn.Module, list[Tensor]]


def batches(number: int) -> Case:
    """Return one layer of 16 channels, and this number of batches of 8."""
    return nn.BatchNorm1d(16), [torch.randn(8, 16)] * number


def channels(number: int) -> Case:
    """Return one layer of this number of channels, and 10 batches of 32."""
    return nn.BatchNorm1d(number), [torch.randn(32, number)] * 10


def layers(number: int) -> Case:
    """Return this number of layers of 16 channels, and 10 batches of 32."""
    return nn.Sequential(*(nn.BatchNorm1d(16) for _ in range(number))), [torch.randn(32, 16)] * 10


@dataclass
class Sweep:
    """What was measured of one axis; each figure by its number of batches, channels or layers."""

    axis: str
    times: dict[int, Timing] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)


AXES: dict[Callable[[int], Case], list[int]] = {
    batches: [10, 30, 100, 300, 1_000, 3_000, 10_000],
    channels: [16, 64, 256, 1_024, 4_096, 16_384, 65_536],
    layers: [1, 3, 10, 30, 100, 300, 1_000],
}


def measure(run: Run) -> list[Row]:
    """Measure every axis, and draw them."""
    sweeps = []
    for make, numbers in AXES.items():
        functions = {
            number: _recalibration(make(number))
            for number in (numbers[:3] if run.quick else numbers)
        }
        sweeps.append(
            Sweep(
                make.__name__,
                compare(functions, rounds=1 if run.quick else 15),
                {number: peak_bytes(function) for number, function in functions.items()},
            )
        )
    draw(sweeps, run.folder / "scale.png")
    return [row for sweep in sweeps for row in _rows(sweep)]


def _recalibration(case: Case) -> Callable[[], object]:
    model, data = case
    on_device = [data[0].to(device())] * len(data)
    return partial(bnstats.recompute_population_stats, model.to(device()), on_device)


def line(figures: dict[int, float]) -> tuple[float, float]:
    """Return slope and intercept of the straight line with the least relative errors."""
    numbers, values = np.array([*figures]), np.array([*figures.values()])
    slope, intercept = np.polyfit(numbers, values, 1, w=1 / values)
    return float(slope), float(intercept)


def _rows(sweep: Sweep) -> list[Row]:
    """Return the figures, and how far they stray from the straight lines."""
    work = f"recalibration against {sweep.axis}"
    medians = {number: timing.median for number, timing in sweep.times.items()}
    return [
        *(Row(work, f"{n:,} {sweep.axis}", "time", *t) for n, t in sweep.times.items()),
        Row(work, "all", "time, farthest from its line", _farthest(medians), unit="of it"),
        *(
            Row(work, f"{n:,} {sweep.axis}", "peak memory", peak, unit="bytes")
            for n, peak in sweep.peaks.items()
        ),
        Row(work, "all", "memory, farthest from its line", _farthest(sweep.peaks), unit="of it"),
    ]


def _farthest(figures: dict[int, float]) -> float:
    slope, intercept = line(figures)
    return max(abs((slope * n + intercept) / value - 1) for n, value in figures.items())


def draw(sweeps: list[Sweep], path: Path) -> None:
    """Draw time above memory, an axis in each column."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, len(sweeps), sharex="col", sharey="row")
    for column, sweep in enumerate(sweeps):
        timings = {n: 1e3 * np.array(t) for n, t in sweep.times.items()}
        medians = {n: t[0] for n, t in timings.items()}
        _panel(panels[0, column], medians)
        middle_half = np.array([(m - low, high - m) for m, low, high in timings.values()]).T
        panels[0, column].errorbar(
            [*medians], [*medians.values()], np.abs(middle_half), fmt="none", ecolor="C0"
        )
        _panel(panels[1, column], {n: peak / 1e3 for n, peak in sweep.peaks.items()})
        panels[1, column].set_xlabel(f"number of {sweep.axis}")
    panels[0, 0].set_ylabel("time, ms")
    panels[1, 0].set_ylabel("peak memory, kB")
    figure.savefig(path, dpi=120)


def _panel(panel: object, figures: dict[int, float]) -> None:
    slope, intercept = line(figures)
    x = np.geomspace(min(figures), max(figures), 100)
    panel.plot(x, slope * x + intercept, color="0.6", label=f"{intercept:.3g} + {slope:.3g} n")
    panel.plot([*figures], [*figures.values()], "o", color="C0")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", frameon=False)


if __name__ == "__main__":
    command.main("scale")
