"""The demo's figure: running averages in the upper row, small batches in the lower one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bnstats.cli.demo import Look, Training

Style: TypeAlias = dict[str, Any]

# Distinct in grey too: by lightness, markers and line styles.
_RUNNING: Style = {"color": "#b2182b", "marker": "o"}
_POPULATION: Style = {"color": "#67a9cf", "marker": "s"}
_TRAININGS: list[Style] = [
    {"color": "#4d4d4d", "marker": "s", "linestyle": "-"},
    {"color": "#f4a582", "marker": "o", "linestyle": "-"},
    {"color": "#2166ac", "marker": "^", "linestyle": "--"},
]


def figure_of(looks: Sequence[Look], trainings: Sequence[Training]) -> Figure:
    """Draw both acts, without any display."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    upper, lower = halves
    upper.suptitle(
        "1. Are the running averages right? A convolutional net on digits", weight="bold"
    )
    errors, shifts, ratios = upper.subplots(1, 3)
    _draw_looks(errors, looks)
    _draw_drift(shifts, looks, "mean_shift", 0.0)
    shifts.set_title("mean: running - population")
    shifts.set_ylabel("standard deviations; a dot a channel")
    _draw_drift(ratios, looks, "var_ratio", 1.0)
    ratios.set_title("variance: running / population")

    lower.suptitle("2. What do small batches do? A perceptron, gradients of 32", weight="bold")
    errors, variances, gradients = lower.subplots(1, 3)
    _draw_errors(errors, trainings)
    _draw_norms(variances, trainings, "var")
    variances.set_title("variance that normalizes, layer norm2")
    _draw_norms(gradients, trainings[:2], "psi")
    gradients.set_title("Psi = E[y dL/dy], layer norm2")
    return figure


def _draw_looks(axes: Axes, looks: Sequence[Look]) -> None:
    epochs = [look.epoch for look in looks]
    running = [100 * look.running[1] for look in looks]
    population = [100 * look.population[1] for look in looks]
    axes.plot(epochs, running, label="running averages", **_RUNNING)
    axes.plot(epochs, population, label="population statistics", **_POPULATION)
    axes.set_title("held-out error, evaluated with")
    _finish_errors(axes)


def _draw_drift(axes: Axes, looks: Sequence[Look], quantity: str, equal: float) -> None:
    """Draw one dot a channel, the layers side by side, for the first and the last epoch."""
    sides: list[tuple[Look, float, Style]] = [
        (looks[0], -0.15, {"color": "#b2182b", "marker": "o"}),
        (looks[-1], 0.15, {"color": "#4d4d4d", "marker": "^"}),
    ]
    for look, offset, style in sides:
        for place, drift in enumerate(look.result.drift.values()):
            values = getattr(drift, quantity)
            label = f"after epoch {look.epoch}" if place == 0 else None
            places = [place + offset] * len(values)
            axes.plot(places, values, linestyle="", markersize=4, alpha=0.5, label=label, **style)
    axes.axhline(equal, color="black", linewidth=0.8)
    axes.set_xticks(range(len(looks[0].result.drift)), list(looks[0].result.drift))
    axes.legend()


def _draw_errors(axes: Axes, trainings: Sequence[Training]) -> None:
    for training, style in zip(trainings, _TRAININGS, strict=True):
        errors = [100 * error for error in training.errors]
        axes.plot(range(1, len(errors) + 1), errors, label=training.title, **style)
    axes.set_title("held-out error, normalized by")
    _finish_errors(axes)


def _finish_errors(axes: Axes) -> None:
    axes.set_xlabel("epoch (learning rate falls to 0)")
    axes.set_ylabel("error, %")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_norms(axes: Axes, trainings: Sequence[Training], statistic: str) -> None:
    """Draw the l2 norm over channels of each batch, against the share of the training done."""
    # The noisiest first: the others are drawn over it.
    order = sorted(range(len(trainings)), key=lambda i: i != 1)
    for index in order:
        record = trainings[index].record
        assert record is not None
        norms = getattr(record["norm2"], statistic).norm(dim=1)
        share = [100 * (i + 1) / len(norms) for i in range(len(norms))]
        style = {key: _TRAININGS[index][key] for key in ("color", "linestyle")}
        axes.plot(share, norms, linewidth=0.8, label=trainings[index].title, **style)
    axes.set_yscale("log")
    axes.set_xlabel("% of the training")
    axes.set_ylabel("l2 norm over channels")
    axes.legend()
