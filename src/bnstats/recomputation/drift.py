"""How far running statistics are from population statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bnstats.formatting import MAX_ROWS, counted, describe, html_bar, html_table, remainder
from bnstats.recomputation.layer_stats import LayerStats, RunningStats, with_eps
from bnstats.traversal import ByLayer


class Drift(NamedTuple):
    """How far a layer's running statistics are from the population's; each of shape (C,).

    In units of what evaluation divides by, ``sqrt(var + eps)``: a channel counts by its effect
    on the layer's output, and one without variance (a dead channel) stays finite::

        mean_shift = (running_mean - mean) / sqrt(var + eps)
        var_ratio  = (running_var + eps) / (var + eps)
        kl         = (log(var_ratio) + 1 / var_ratio - 1
                      + (running_mean - mean)^2 / (running_var + eps)) / 2

    Attributes:
        mean_shift: running mean minus population mean, in standard deviations.
        var_ratio: running variance over population variance.
        kl: Kullback-Leibler divergence, in nats, of the Gaussian with the running statistics
            from the Gaussian with the population's: ``KL(population || running)``.

    Example:
        >>> import torch, bnstats
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> data = torch.tensor([[3.0, 0.0], [5.0, 0.0], [7.0, 0.0]])  # the second one is dead
        >>> stats = bnstats.measure_population_stats(layer, [data])
        >>> drift = stats.drift_from(layer)[""]
        >>> [[round(value, 3) for value in values.tolist()] for values in drift[:2]]
        [[-2.5, 0.0], [0.25, 100001.0]]
    """

    mean_shift: Tensor
    var_ratio: Tensor
    kl: Tensor

    def __repr__(self) -> str:
        return describe("Drift", self._asdict())


class DriftReport(ByLayer[Drift]):
    """How far each layer is off: a dict from layer name to :class:`Drift`, printed as a table.

    Attributes:
        population: the statistics that the running ones are compared with, by layer name.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
        >>> loader = (5 + torch.randn(64, 3)).split(16)
        >>> report = bnstats.measure_population_stats(model, loader).drift_from(model)
        >>> report.worst_first()  # the second one sees what the first has normalized
        ['0', '1']
        >>> print(str(report).splitlines()[0])
        2 BatchNorm layers, running against population statistics
    """

    def __init__(
        self, drifts: Iterable[tuple[str, Drift]], population: Mapping[str, LayerStats]
    ) -> None:
        super().__init__(drifts)
        self.population = population

    def worst_first(self) -> list[str]:
        """Return the layers' names by their mean divergence, the largest first, NaN before all."""
        return worst_first(self)

    @property
    def _heading(self) -> str:
        layers = counted(len(self), "BatchNorm layer")
        return f"{layers}, running against population statistics"

    def __str__(self) -> str:
        """Return a table of the layers, the one with the largest divergence first."""
        return f"{self._heading}\n\n{table(self.population, self)}" if self else self._heading

    def __repr__(self) -> str:
        return shortened(self._heading, self.population, self)

    def _repr_html_(self) -> str:
        return html(self._heading, self.population, self)


def compare(
    running: Mapping[str, RunningStats], population: Mapping[str, LayerStats]
) -> DriftReport:
    """Return the drift of the running statistics of layers from their populations'."""
    if not running:
        return DriftReport((), {})
    stats = [population[name] for name in running]
    mean, var = (torch.cat([getattr(x, kind) for x in stats]) for kind in RunningStats._fields)
    # All layers at once, their channels laid end to end.
    columns = zip(*running.values(), strict=True)
    # (First to the CPU: a device may not have the dtype.)
    before = RunningStats(*(torch.cat([x.cpu().to(mean) for x in column]) for column in columns))
    eps = torch.cat([torch.full_like(x.var, x.eps) for x in stats])
    moved = _drift(before, mean, var, eps)
    parts = zip(*(part.split([x.num_features for x in stats]) for part in moved), strict=True)
    # Clones: a view would keep the memory of all layers alive.
    drifts = (
        (name, Drift(*(values.clone() for values in part)))
        for name, part in zip(running, parts, strict=True)
    )
    return DriftReport(drifts, {name: population[name] for name in running})


def _drift(running: RunningStats, mean: Tensor, var: Tensor, eps: Tensor) -> Drift:
    difference = running.mean - mean
    running_square, square = with_eps(running.var, eps), with_eps(var, eps)
    ratio = running_square / square
    kl = ratio.log() + 1 / ratio - 1 + difference.square() / running_square
    return Drift(difference / square.sqrt(), ratio, kl.clamp(min=0) / 2)


def worst_first(drifts: Mapping[str, Drift]) -> list[str]:
    """Return the layers' names by their mean divergence, the largest first, NaN before all."""
    divergences = {name: _mean(drift.kl.nan_to_num(nan=math.inf)) for name, drift in drifts.items()}
    return sorted(divergences, key=lambda name: -divergences[name])


class _Row(NamedTuple):
    """One layer's row of a table: rms over channels, or their extremes."""

    channels: int
    dead: int
    values: int
    shift: float
    worst_shift: float
    least_ratio: float
    most_ratio: float
    kl: float
    stderr: float


def _row(stats: LayerStats, moved: Drift) -> _Row:
    return _Row(
        channels=stats.num_features,
        dead=int(stats.dead.sum()),
        values=stats.count,
        shift=_rms(moved.mean_shift),
        worst_shift=float(moved.mean_shift.abs().max()),
        least_ratio=float(moved.var_ratio.min()),
        most_ratio=float(moved.var_ratio.max()),
        kl=_mean(moved.kl),
        stderr=_rms(stats.mean_stderr / with_eps(stats.var, stats.eps).sqrt()),
    )


def table(
    stats: Mapping[str, LayerStats], drifts: Mapping[str, Drift], limit: int | None = None
) -> str:
    """Return a table of the layers, the one with the largest divergence first.

    Dead channels are counted in a column of their own, where there are some.
    """
    names = worst_first(drifts)[:limit]
    rows = {name: _row(stats[name], drifts[name]) for name in names}
    width = max(len("layer"), *map(len, rows))
    title = (
        f"{'layer':<{width}}  {'channels':>8}  {'dead':>6}  {'values':>12}  "
        f"{'mean shift, sd':>16}  {'var ratio':>15}  {'KL, nats':>9}  {'stderr, sd':>10}"
    )
    units = (
        f"{'':<{width}}  {'':>8}  {'':>6}  {'per channel':>12}  {'rms':>7}  {'worst':>7}  "
        f"{'least':>7} {'most':>7}  {'mean':>9}  {'rms':>10}"
    )
    lines = [title, units, *(_line(name, row, width) for name, row in rows.items())]
    if any(row.dead for row in rows.values()):
        return "\n".join(lines)
    start = width + len("  channels")
    return "\n".join(line[:start] + line[start + 8 :] for line in lines)


def _line(name: str, row: _Row, width: int) -> str:
    return (
        f"{name:<{width}}  {row.channels:>8}  {row.dead:>6}  {row.values:>12,}  "
        f"{_short(row.shift)}  {_short(row.worst_shift)}  "
        f"{_short(row.least_ratio)} {_short(row.most_ratio)}  {row.kl:>9.2g}  {row.stderr:>10.4f}"
    )


def shortened(heading: str, stats: Mapping[str, LayerStats], drifts: Mapping[str, Drift]) -> str:
    """Return the heading and a table of the worst layers: what a ``repr`` shows."""
    if not drifts:
        return heading
    note = remainder(len(drifts), "; print() shows all")
    return "\n".join([heading, "", table(stats, drifts, MAX_ROWS), *note])


def html(heading: str, stats: Mapping[str, LayerStats], drifts: Mapping[str, Drift]) -> str:
    """Return what a notebook shows: the worst layers, their shifts and ratios as bars."""
    rows = {name: _row(stats[name], drifts[name]) for name in worst_first(drifts)[:MAX_ROWS]}
    largest = max((x.worst_shift for x in rows.values() if math.isfinite(x.worst_shift)), default=0)
    logs = [abs(_log(x)) for row in rows.values() for x in (row.least_ratio, row.most_ratio)]
    widest = max(logs, default=0)
    titles = ["layer", "channels", "values", "mean shift, sd: rms", "worst"]
    titles += ["var ratio: least", "most", "", "KL, nats", "stderr, sd"]
    cells = [[name, *_cells(row, largest, widest)] for name, row in rows.items()]
    note = "".join(remainder(len(drifts), "; print() shows all"))
    return html_table(heading, titles, cells, note)


def _cells(row: _Row, largest: float, widest: float) -> list[str]:
    def place(ratio: float) -> float:
        return 0.5 + 0.5 * _log(ratio) / widest if widest else 0.5

    channels = f"{row.channels} ({row.dead} dead)" if row.dead else str(row.channels)
    # From 1, which is in the middle, to the extremes.
    ratios = html_bar(min(place(row.least_ratio), 0.5), max(place(row.most_ratio), 0.5), "")
    return [
        channels,
        f"{row.values:,}",
        _short(row.shift),
        html_bar(0, _share(row.worst_shift, largest), _short(row.worst_shift)),
        _short(row.least_ratio),
        _short(row.most_ratio),
        ratios,
        f"{row.kl:.2g}",
        f"{row.stderr:.4f}",
    ]


def _share(value: float, largest: float) -> float:
    """Return which part of a bar a value takes; all of it where it is not finite."""
    if not math.isfinite(value):
        return 1
    return value / largest if largest else 0


def _log(ratio: float) -> float:
    """Return a ratio's logarithm, within what a bar can show."""
    return 0 if math.isnan(ratio) else math.log(min(max(ratio, 1e-6), 1e6))


def _short(value: float) -> str:
    """Return seven characters: a dead channel's huge ratio must not widen the table."""
    text = f"{value:7.3f}"
    return text if len(text) == 7 else f"{value:7.1e}"


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
