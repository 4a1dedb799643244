"""How far each layer's statistics are off, how sure that is, and what would explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.diagnosis.running_error import error_of_average
from bnstats.recomputation import Drift, LayerStats
from bnstats.recomputation.layer_stats import with_eps

MATERIAL = 0.1
"""Distance from which on statistics are off: in standard deviations of the layer's output."""

_SURE = 2.0
"""Standard errors from which on a distance is no chance: it is a mean over channels."""

_DEFAULT = 19
"""Batches that an average of momentum 0.1 is worth."""


class Distance(NamedTuple):
    """How far a layer's statistics are off, in standard deviations of its output.

    A mean is off by its shift; a variance off by a factor ``1 + r`` scales the output by half of r.

    Attributes:
        size: root mean square over channels of the shift and half the logarithm of the
            variances' ratio.
        stderr: the same of their standard errors; NaN where these are not known.
    """

    size: float
    stderr: float

    @property
    def is_material(self) -> bool:
        """Whether it is large and no chance."""
        return self.size > MATERIAL and self.size > _SURE * self.stderr

    @property
    def may_be_material(self) -> bool:
        """Whether it is large, be it by chance."""
        return self.size > MATERIAL

    def __str__(self) -> str:
        return f"{self.size:.2f} ± {self.stderr:.2f} sd"


def distance(drift: Drift, *errors: LayerStats) -> Distance:
    """Return a drift as one number, with the errors of the statistics that it is between."""
    size = _combine(drift.mean_shift, drift.var_ratio.log())
    return Distance(size, math.hypot(*(_stderr(stats) for stats in errors)))


def _combine(shift: Tensor, log_ratio: Tensor) -> float:
    return float((shift.square() + log_ratio.square() / 4).mean().sqrt())


def _stderr(stats: LayerStats) -> float:
    """Return the standard error of statistics, from their samples if known, else from batches."""
    if stats.num_samples > 1:
        return _of_samples(stats, 1)
    square = with_eps(stats.var, stats.eps)
    return _combine(stats.mean_stderr / square.sqrt(), stats.var_stderr / square)


def _of_samples(stats: LayerStats, num_parts: int) -> float:
    """Return the standard error of one of several equal parts, by the spread between samples."""
    square = with_eps(stats.var, stats.eps)
    share = num_parts * stats.sample_spread[:, 0, 0] / stats.count**2
    of_mean, of_var = stats.sample_covariance.diagonal(dim1=1, dim2=2).unbind(1)
    # An error taken from few samples is itself unsure: the variance of Student's t.
    few = stats.num_samples
    share = share * ((few - 1) / (few - 3) if few > 3 else math.nan)
    return _combine((share * of_mean).sqrt() / square.sqrt(), (share * of_var).sqrt() / square)


class Explained(NamedTuple):
    """What of a layer's drift its averaging explains.

    Attributes:
        momentum: its weight of a new batch; None for an average over all batches.
        num_updates: batches that it has averaged; None where it is not known.
        initial_weight: the weight of the initial 0 and 1; 0 in a debiased average.
        of_one_batch: standard error of one batch's statistics, by the spread between batches.
        of_its_samples: the same by the spread between samples, as if each batch took them at
            random; NaN where it is not known.
        expected: that of the average, by its momentum.
        at_default: that of an average of momentum 0.1.
    """

    momentum: float | None
    num_updates: int | None
    initial_weight: float
    of_one_batch: float
    of_its_samples: float
    expected: float
    at_default: float


def explain(layer: _BatchNorm, stats: LayerStats) -> Explained:
    """Return what explains a layer's drift, by its own momentum and number of updates."""
    updates = _num_updates(layer)
    # A cumulative layer keeps a momentum for the way back, of no effect.
    momentum = None if hasattr(layer, "num_values_tracked") else layer.momentum

    def expected(effective_batches: float) -> float:
        error = error_of_average(stats, effective_batches)
        return _combine(error.mean_shift, error.var_ratio)

    if momentum is None:
        effective = float(max(updates or 1, 1))
    else:
        effective = (2 - momentum) / momentum if 0 < momentum <= 1 else math.inf
    debiased = bool(getattr(layer, "debias", False))
    initial_weight = 0.0
    if updates is not None and momentum is not None and not debiased:
        initial_weight = (1 - momentum) ** updates
    return Explained(
        momentum=momentum,
        num_updates=updates,
        initial_weight=initial_weight,
        of_one_batch=expected(1),
        of_its_samples=_of_samples(stats, stats.num_batches) if stats.num_samples else math.nan,
        expected=expected(effective),
        at_default=expected(_DEFAULT),
    )


def _num_updates(layer: _BatchNorm) -> int | None:
    """Return how many batches a layer counted; None where its counter is not known."""
    if layer.num_batches_tracked is None:
        return None
    updates = int(layer.num_batches_tracked)
    assert layer.running_mean is not None and layer.running_var is not None
    # A counter of 0 beside statistics that have moved came with a checkpoint that lacked it.
    untouched = bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())
    return updates if updates or untouched else None


def not_finite(layers: Mapping[str, _BatchNorm]) -> dict[str, int]:
    """Return the layers whose running statistics cannot normalize, with how many channels."""
    bad = {}
    for name, layer in layers.items():
        assert layer.running_mean is not None and layer.running_var is not None
        mean, var = layer.running_mean, layer.running_var
        channels = ~torch.isfinite(mean) | ~torch.isfinite(var) | (var < 0)
        if channels.any():
            bad[name] = int(channels.sum())
    return bad
