"""How far running statistics are from population statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bnstats.recompute.layer_stats import LayerStats, RunningStats, with_eps
from bnstats.traversal import ByLayer


class Drift(NamedTuple):
    """How far a layer's running statistics are from the population's; each of shape (C,).

    Measured in what evaluation divides by, the root of ``var + eps``, so that a channel counts
    by what it does to the layer's output, and one without variance (a dead one) is finite::

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


def compare(
    running: Mapping[str, RunningStats], population: Mapping[str, LayerStats]
) -> dict[str, Drift]:
    """Return how far the running statistics of layers are from their populations'."""
    if not running:
        return ByLayer()
    stats = [population[name] for name in running]
    mean, var = (torch.cat([getattr(x, kind) for x in stats]) for kind in RunningStats._fields)
    # All layers at once, their channels laid end to end.
    columns = zip(*running.values(), strict=True)
    # (First to the CPU: a device may not have the dtype.)
    before = RunningStats(*(torch.cat([x.cpu().to(mean) for x in column]) for column in columns))
    eps = torch.cat([torch.full_like(x.var, x.eps) for x in stats])
    moved = _drift(before, mean, var, eps)
    parts = zip(*(part.split([x.num_features for x in stats]) for part in moved), strict=True)
    # Clones: a layer's own is not to keep that of all layers.
    return ByLayer(
        (name, Drift(*(values.clone() for values in part)))
        for name, part in zip(running, parts, strict=True)
    )


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


def table(stats: Mapping[str, LayerStats], drifts: Mapping[str, Drift]) -> str:
    """Return a table of the layers, the one with the largest divergence first.

    Dead channels are counted in a column of their own, where there are some.
    """
    width = max(len("layer"), *map(len, drifts))
    dead = any(bool(stats[name].dead.any()) for name in drifts)
    title = (
        f"{'layer':<{width}}  {'channels':>8}  {'dead':>6}  {'values':>12}  "
        f"{'mean shift, sd':>16}  {'var ratio':>15}  {'KL, nats':>9}  {'stderr, sd':>10}"
    )
    units = (
        f"{'':<{width}}  {'':>8}  {'':>6}  {'per channel':>12}  {'rms':>7}  {'worst':>7}  "
        f"{'least':>7} {'most':>7}  {'mean':>9}  {'rms':>10}"
    )
    rows = [_row(name, stats[name], drifts[name], width) for name in worst_first(drifts)]
    start = width + len("  channels")
    shown = [x if dead else x[:start] + x[start + 8 :] for x in [title, units, *rows]]
    return "\n".join(shown)


def _row(name: str, stats: LayerStats, moved: Drift, width: int) -> str:
    stderr = stats.mean_stderr / with_eps(stats.var, stats.eps).sqrt()
    return (
        f"{name:<{width}}  {stats.num_features:>8}  {int(stats.dead.sum()):>6}  "
        f"{stats.count:>12,}  {_short(_rms(moved.mean_shift))}  "
        f"{_short(float(moved.mean_shift.abs().max()))}  "
        f"{_short(float(moved.var_ratio.min()))} {_short(float(moved.var_ratio.max()))}  "
        f"{_mean(moved.kl):>9.2g}  {_rms(stderr):>10.4f}"
    )


def _short(value: float) -> str:
    """Return seven characters: what one dead channel makes is not to widen the table."""
    text = f"{value:7.3f}"
    return text if len(text) == 7 else f"{value:7.1e}"


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
