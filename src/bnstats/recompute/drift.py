"""How far running statistics are from population statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bnstats.recompute.layer_stats import LayerStats, RunningStats
from bnstats.traversal import ByLayer


class Drift(NamedTuple):
    """How far a layer's running statistics are from the population's; each of shape (C,).

    Attributes:
        mean_shift: running mean minus population mean, in population standard deviations.
        var_ratio: running variance over population variance.
        kl: Kullback-Leibler divergence, in nats, of the Gaussian with the running statistics
            from the Gaussian with the population's: ``KL(population || running)``.

    Example:
        >>> import torch, bnstats
        >>> layer = torch.nn.BatchNorm1d(1)
        >>> data = torch.tensor([[3.0], [5.0], [7.0]])
        >>> stats = bnstats.measure_population_stats(layer, [data])
        >>> drift = stats.drift_from(layer)[""]
        >>> drift.mean_shift.item(), drift.var_ratio.item()
        (-2.5, 0.25)
    """

    mean_shift: Tensor
    var_ratio: Tensor
    kl: Tensor


def compare(
    running: Mapping[str, RunningStats], population: Mapping[str, LayerStats]
) -> dict[str, Drift]:
    """Return how far the running statistics of layers are from their populations'.

    A channel of no variance compares as equal (0, 1, 0) where the running value is the same,
    else as infinitely far.
    """
    if not running:
        return ByLayer()
    stats = [population[name] for name in running]
    mean, var = (torch.cat([getattr(x, kind) for x in stats]) for kind in RunningStats._fields)
    # All layers at once, their channels laid end to end.
    columns = zip(*running.values(), strict=True)
    before = RunningStats(*(torch.cat([x.to(mean) for x in column]) for column in columns))
    moved = _drift(before, mean, var)
    parts = zip(*(part.split([x.num_features for x in stats]) for part in moved), strict=True)
    # Clones: a layer's own is not to keep that of all layers.
    return ByLayer(
        (name, Drift(*(values.clone() for values in part)))
        for name, part in zip(running, parts, strict=True)
    )


def _drift(running: RunningStats, mean: Tensor, var: Tensor) -> Drift:
    difference = running.mean - mean
    same_var = running.var == var
    shift = torch.where(difference == 0, 0, difference / var.sqrt())
    ratio = torch.where(same_var, 1, running.var / var)
    squared = torch.where(difference == 0, 0, difference.square() / running.var)
    kl = (ratio.log() + torch.where(same_var, 1, var / running.var) + squared - 1) / 2
    return Drift(shift, ratio, kl)


def worst_first(drifts: Mapping[str, Drift]) -> list[str]:
    """Return the layers' names by their mean divergence, the largest first."""
    return sorted(drifts, key=lambda name: -_mean(drifts[name].kl))


def table(stats: Mapping[str, LayerStats], drifts: Mapping[str, Drift]) -> str:
    """Return a table of the layers, the one with the largest divergence first."""
    width = max(len("layer"), *map(len, drifts))
    title = (
        f"{'layer':<{width}}  {'channels':>8}  {'values':>12}  {'mean shift, sd':>16}  "
        f"{'var ratio':>15}  {'KL, nats':>9}  {'stderr, sd':>10}"
    )
    units = (
        f"{'':<{width}}  {'':>8}  {'per channel':>12}  {'rms':>7}  {'worst':>7}  "
        f"{'least':>7} {'most':>7}  {'mean':>9}  {'rms':>10}"
    )
    rows = [_row(name, stats[name], drifts[name], width) for name in worst_first(drifts)]
    return "\n".join([title, units, *rows])


def _row(name: str, stats: LayerStats, moved: Drift, width: int) -> str:
    stderr = torch.where(stats.mean_stderr == 0, 0, stats.mean_stderr / stats.var.sqrt())
    return (
        f"{name:<{width}}  {stats.num_features:>8}  {stats.count:>12,}  "
        f"{_rms(moved.mean_shift):>7.3f}  {moved.mean_shift.abs().max():>7.3f}  "
        f"{moved.var_ratio.min():>7.3f} {moved.var_ratio.max():>7.3f}  "
        f"{_mean(moved.kl):>9.2g}  {_rms(stderr):>10.4f}"
    )


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
