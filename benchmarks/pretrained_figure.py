"""The figure of trainings on photographs: before and after recalibration, and on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.fine_tuning import PRETRAINED, VARIANTS, Cell, Training

# Told apart in grey too: by lightness and markers.
RUNNING: dict[str, Any] = {"color": "#b2182b", "marker": "o"}
POPULATION: dict[str, Any] = {"color": "#67a9cf", "marker": "s"}
STEPS = 60


def figure_of(cells: Mapping[Cell, Sequence[Training]]) -> Figure:
    """Draw every seed of the fine-tunings for 60 steps, and the first seed's longest curves."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    order = list(VARIANTS)
    ordered = sorted(cells, key=lambda cell: order.index(cell.variant))
    shown = {cell: cells[cell] for cell in ordered if cell.network == PRETRAINED}
    _draw_seeds(halves[0], {cell: done for cell, done in shown.items() if cell.steps == STEPS})
    _draw_curves(halves[1], shown)
    return figure


def _draw_seeds(half: Any, cells: Mapping[Cell, Sequence[Training]]) -> None:
    half.suptitle(
        f"EfficientNet-Lite0, {STEPS} steps on pictures; a line a seed, from running averages "
        "to population statistics",
        weight="bold",
    )
    batches = sorted({cell.batch for cell in cells}, reverse=True)
    variants = [sum(cell.batch == batch for cell in cells) for batch in batches]
    grid = {"width_ratios": variants}  # as much room for each name
    panels = half.subplots(1, len(batches), sharey=True, squeeze=False, gridspec_kw=grid)[0]
    for axes, batch in zip(panels, batches, strict=True):
        here = {cell: done for cell, done in cells.items() if cell.batch == batch}
        for place, trainings in enumerate(here.values()):
            for offset, training in zip(_spread(len(trainings)), trainings, strict=True):
                ends = [100 * training.running, 100 * training.pooled]
                places = [place + offset - 0.08, place + offset + 0.08]
                axes.plot(places, ends, color="#4d4d4d", linewidth=0.7)
                axes.plot(places[:1], ends[:1], markersize=4, **RUNNING)
                axes.plot(places[1:], ends[1:], markersize=4, **POPULATION)
        names = [_short(cell.variant) for cell in here]
        axes.set_xticks(range(len(names)), names, fontsize=5)
        axes.set_title(f"normalized over {batch}")
    panels[0].set_ylabel("held-out accuracy, %")


def _spread(count: int) -> list[float]:
    return [0.35 * (2 * i + 1 - count) / max(count, 2) for i in range(count)]


def _short(variant: str) -> str:
    """Return a variant's name on lines of a word or two."""
    for name, short in (("MovingAverageBatchNorm", "MABN"), ("EMABatchNorm", "EMA")):
        variant = variant.replace(name, short)
    variant = variant.replace("RenormBatchNorm", "Renorm").replace("weights as they are", "as is")
    return variant.replace(", ", "\n").replace(" ", "\n")


def _draw_curves(half: Any, cells: Mapping[Cell, Sequence[Training]]) -> None:
    half.suptitle("After each epoch of the first seed's longest training", weight="bold")
    curves = {(cell, t.curve) for cell, done in cells.items() for t in done if t.curve}
    longest: dict[tuple[str, int], tuple[int, Any]] = {}
    for cell, curve in curves:
        key = (cell.variant, cell.batch)
        longest[key] = max(longest.get(key, (0, ())), (cell.steps, curve))
    kinds = list(dict.fromkeys(cell.variant for cell in cells))
    panels = half.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, variant in zip(panels, kinds, strict=True):
        for batch, line in ((16, "-"), (2, ":")):
            if (variant, batch) in longest:
                _draw_curve(axes, longest[variant, batch][1], batch, line)
        axes.set_title(_short(variant).replace("\n", " "), fontsize=8)
        axes.set_xlabel("steps")
    panels[0].set_ylabel("held-out accuracy, %")
    half.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _draw_curve(axes: Axes, curve: Any, batch: int, line: str) -> None:
    steps, running, population = zip(*curve, strict=True)
    for name, values, style in (
        ("running averages", running, RUNNING),
        ("population statistics", population, POPULATION),
    ):
        percent = [100 * value for value in values]
        label = f"{name}, {batch}"
        axes.plot(steps, percent, line, label=label, markersize=4, **style)
