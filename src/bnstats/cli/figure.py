"""The demo's figure: errors by epoch, and every channel's drift after the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bnstats.cli.demo import Epoch

Style: TypeAlias = dict[str, Any]

# Dark and light enough to be told apart in grey, with different markers as well.
_RUNNING: Style = {"color": "#b2182b", "marker": "o", "label": "running averages"}
_POPULATION: Style = {"color": "#67a9cf", "marker": "s", "label": "population statistics"}


def figure_of(epochs: Sequence[Epoch]) -> Figure:
    """Draw the story of a training, without any display."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    errors, shifts, ratios = figure.subplots(1, 3)
    _draw_errors(errors, epochs)
    _draw_drift(shifts, epochs, "mean_shift", 0.0)
    shifts.set_title("mean: running minus population")
    shifts.set_ylabel("standard deviations")
    _draw_drift(ratios, epochs, "var_ratio", 1.0)
    ratios.set_title("variance: running over population")
    ratios.set_ylabel("ratio")
    figure.suptitle("Batch norm on digits: are the running averages right?")
    return figure


def _draw_errors(axes: Axes, epochs: Sequence[Epoch]) -> None:
    numbers = [epoch.number for epoch in epochs]
    axes.plot(numbers, [100 * epoch.running[1] for epoch in epochs], **_RUNNING)
    axes.plot(numbers, [100 * epoch.population[1] for epoch in epochs], **_POPULATION)
    axes.set_title("held-out error, evaluated with")
    axes.set_xlabel("epoch (learning rate falls to 0)")
    axes.set_ylabel("error, %")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_drift(axes: Axes, epochs: Sequence[Epoch], quantity: str, equal: float) -> None:
    """Draw one dot a channel, the layers side by side, for the first and the last epoch."""
    looks: list[tuple[Epoch, float, Style]] = [
        (epochs[0], -0.15, {"color": "#b2182b", "marker": "o"}),
        (epochs[-1], 0.15, {"color": "#4d4d4d", "marker": "^"}),
    ]
    for epoch, offset, style in looks:
        for place, drift in enumerate(epoch.result.drift.values()):
            values = getattr(drift, quantity)
            label = f"after epoch {epoch.number}" if place == 0 else None
            axes.plot(
                [place + offset] * len(values), values, linestyle="", markersize=4, alpha=0.5,
                label=label, **style,
            )  # fmt: skip
    axes.axhline(equal, color="black", linewidth=0.8)
    axes.set_xticks(range(len(epochs[0].result.drift)), list(epochs[0].result.drift))
    axes.legend()
