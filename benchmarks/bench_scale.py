"""Time and memory of the recalibration against batches, channels, layers, and their lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
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


@dataclass(frozen=True)
class Sweep:
    """What was measured of one axis; each figure by its number of batches, channels or layers."""

    axis: str
    setting: str
    times: dict[int, Timing]
    peaks: dict[int, int]


AXES: dict[Callable[[int], Case], tuple[str, list[int]]] = {
    batches: ("a layer of 16 channels, batches of 8", [10, 30, 100, 300, 1_000, 3_000, 10_000]),
    channels: ("a layer, 10 batches of 32", [16, 64, 256, 1_024, 4_096, 16_384, 65_536]),
    layers: ("layers of 16 channels, 10 batches of 32", [1, 3, 10, 30, 100, 300, 1_000]),
}


def measure(run: Run) -> list[Row]:
    """Measure every axis, and draw them."""
    sweeps = []
    for make, (setting, numbers) in AXES.items():
        chosen = numbers[:3] if run.quick else numbers
        functions = {number: _recalibration(make(number)) for number in chosen}
        times = compare(functions, rounds=1 if run.quick else 15)
        peaks = {number: peak_bytes(function) for number, function in functions.items()}
        sweeps.append(Sweep(make.__name__, setting, times, peaks))
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
    for (upper, lower), sweep in zip(panels.T, sweeps, strict=True):
        milliseconds = {n: 1e3 * np.array(timing) for n, timing in sweep.times.items()}
        _panel(upper, {n: median for n, (median, _, _) in milliseconds.items()})
        for n, (_, low, high) in milliseconds.items():
            upper.plot([n, n], [low, high], color="C0")
        _panel(lower, {n: peak / 1e3 for n, peak in sweep.peaks.items()})
        upper.set_title(sweep.setting, fontsize="medium")
        lower.set_xlabel(f"n, number of {sweep.axis}")
    panels[0, 0].set_ylabel("time of a recalibration, ms")
    panels[1, 0].set_ylabel("its peak memory, kB")
    figure.savefig(path, dpi=120)


def _panel(panel: Axes, figures: dict[int, float]) -> None:
    """Draw the figures and their straight line, which bends where axes are logarithmic."""
    slope, intercept = line(figures)
    x = np.geomspace(min(figures), max(figures), 100)
    equation = f"{intercept:.3g} + {round(slope, 9) + 0:.3g} n"  # no slope of rounding errors
    panel.plot(x, slope * x + intercept, color="0.6", label=equation)
    panel.plot([*figures], [*figures.values()], "o", color="C0")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", frameon=False)


if __name__ == "__main__":
    command.main("scale")
