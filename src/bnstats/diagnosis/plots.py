"""Figures of what was recorded and recomputed; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from bnstats.diagnosis.record import BatchStatsRecord
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.formatting import counted
from bnstats.recomputation import DriftReport, PopulationStats, Recalibration
from bnstats.recomputation.options import check_positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "mean": "mean",
    "var": "variance",
    "g": "g = E[dL/dy]",
    "psi": "Psi = E[y dL/dy]",
}
_COLORS = ["#b2182b", "#2166ac", "#4d4d4d", "#e08214"]
_LINES = ["-", "--", ":", "-."]


def plot_batch_stats(
    records: BatchStatsRecord | Mapping[str, BatchStatsRecord], layer: str
) -> Figure:
    """Draw the four batch statistics of a layer against the iteration: Figure 2 of MABN's paper.

    Each panel shows the l2 norm over the channels. A statistic that changes a lot from batch
    to batch is noise in the normalization.

    Args:
        records: one record, or several by label, side by side: batch 2 against batch 32.
        layer: the layer's name, in every record.

    Returns:
        A matplotlib figure. As the last expression of a notebook's cell it is displayed.

    Raises:
        InvalidValueError: no record, no such layer, or a layer that never ran.
        ImportError: matplotlib is missing.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> with bnstats.record_batch_stats(model) as record:
        ...     for x in torch.randn(5, 8, 3):
        ...         model(x).square().mean().backward()
        >>> len(bnstats.plot_batch_stats(record, "0").axes)
        4
    """
    labelled = _by_label(records)
    figure = _new_figure(9, 5.5)
    axes = figure.subplots(2, 2, sharex=True).flatten()
    for panel, (statistic, title) in zip(axes, _PANELS.items(), strict=True):
        for index, (label, record) in enumerate(labelled.items()):
            norms = getattr(record[layer], statistic).norm(dim=1)
            style = {"color": _COLORS[index % 4], "linestyle": _LINES[index % 4]}
            panel.plot(range(1, len(norms) + 1), norms, label=label, linewidth=1, **style)
        panel.set_title(title)
        panel.set_ylabel("l2 norm over channels")
    for panel in axes[2:]:
        panel.set_xlabel("iteration")
    if any(labelled):
        axes[0].legend()
    figure.suptitle(f"batch statistics of layer {layer!r}")
    return figure


def plot_drift(
    result: Recalibration | DriftReport | PopulationStats,
    model: nn.Module | None = None,
    *,
    worst: int | None = 20,
) -> Figure:
    """Draw how far running statistics are from the population's, the worst layers first.

    One row a layer, one dot a channel: the shift of the mean in standard deviations on the left,
    the ratio of the variances on the right, both with eps as in :class:`Drift`. The title counts
    the dead channels, which have one value in all of the data, if the layers shown have some.

    Args:
        result: of :func:`bnstats.recompute_population_stats`, for what it has changed; of
            ``stats.drift_from(model)``; or the statistics themselves, with a model.
        model: with PopulationStats only: the model whose running statistics are compared with them.
        worst: the most layers to draw, by their mean KL divergence; None for all.

    Returns:
        A matplotlib figure. As the last expression of a notebook's cell it is displayed.

    Raises:
        InvalidTypeError: none of these; statistics without a model, or a model beside a result
            that has its own; worst no integer.
        InvalidValueError: a result without layers, or worst below 1.
        LayerMismatchError: a layer is not in the model, or has other channels.
        ImportError: matplotlib is missing.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> stats = bnstats.measure_population_stats(model, torch.randn(64, 3).split(8))
        >>> bnstats.plot_drift(stats, model).axes[1].get_xlabel().splitlines()
        ['(running variance + eps)', '/ (population variance + eps)']
    """
    report = _report(result, model)
    check_positive_int("worst", worst)
    names = report.worst_first()[:worst]
    # Names take room from the panels, which would else be narrower than what stands below them.
    longest = max(map(len, names))
    figure = _new_figure(9 + 0.09 * max(longest - 16, 0), 1.8 + 0.28 * len(names))
    shifts, ratios = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(names):
        drift = report[name]
        for panel, values in ((shifts, drift.mean_shift), (ratios, drift.var_ratio)):
            panel.plot(values, [row] * len(values), "o", color="#b2182b", markersize=3, alpha=0.4)
    _label(shifts, 0, "(running mean - population mean)\n/ sqrt(population variance + eps)")
    _label(ratios, 1, "(running variance + eps)\n/ (population variance + eps)")
    ratios.set_xscale("log")
    shifts.set_yticks(range(len(names)), names)
    shifts.invert_yaxis()
    figure.suptitle(_title(report, names))
    return figure


def _report(
    result: Recalibration | DriftReport | PopulationStats, model: nn.Module | None
) -> DriftReport:
    """Return the drift that is to be drawn."""
    if not isinstance(result, (Recalibration, DriftReport, PopulationStats)):
        swapped = isinstance(result, nn.Module) and model is not None
        raise InvalidTypeError(
            "result: expected a Recalibration, a DriftReport, or PopulationStats and a model, got "
            f"{type(result).__name__}"
            + (": the arguments are swapped, pass (stats, model)" if swapped else "")
        )
    if not isinstance(result, PopulationStats):
        if model is not None:
            raise InvalidTypeError(
                f"model: expected none beside a {type(result).__name__}, got "
                f"{type(model).__name__}; it goes with PopulationStats alone"
            )
        report = result.drift if isinstance(result, Recalibration) else result
    elif model is None:
        raise InvalidTypeError(
            "result: expected PopulationStats together with the model whose running statistics "
            "are compared with them, got none: plot_drift(stats, model)"
        )
    else:
        report = result.drift_from(model)
    if not report:
        raise InvalidValueError("result: expected at least one layer, got none")
    return report


def _title(report: DriftReport, names: list[str]) -> str:
    """Return which of how many layers are shown."""
    total = len(report)
    if len(names) < total:
        layers = (
            f"the worst of {total} layers"
            if len(names) == 1
            else (f"the worst {len(names)} of {total} layers")
        )
    else:
        layers = "1 layer" if total == 1 else f"all {total} layers"
    title = f"running against population statistics, {layers}"
    if dead := sum(int(report.population[name].dead.sum()) for name in names):
        title += f", {counted(dead, 'dead channel')}"
    return title


def _by_label(records: object) -> Mapping[str, BatchStatsRecord]:
    if isinstance(records, BatchStatsRecord):
        return {"": records}
    if not isinstance(records, Mapping) or not all(
        isinstance(record, BatchStatsRecord) for record in records.values()
    ):
        raise InvalidTypeError(
            "records: expected what record_batch_stats gave, or several such by label, got "
            f"{type(records).__name__}"
        )
    if not records:
        raise InvalidValueError("records: expected at least one")
    return records


def _label(panel: Any, equal: float, text: str) -> None:
    panel.axvline(equal, color="black", linewidth=0.8)
    panel.set_xlabel(text)
    panel.grid(axis="y", linewidth=0.3)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from bnstats.diagnosis.figure import NotebookFigure
    except ImportError as error:
        raise ImportError("figures are drawn with matplotlib: pip install matplotlib") from error
    return NotebookFigure(figsize=(width, height), layout="constrained")
