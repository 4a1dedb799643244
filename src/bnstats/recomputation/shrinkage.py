"""Statistics of few samples, drawn toward those of another data set by a measured weight.

For one layer and a loader of k samples, in units of the source's standard deviation: ``shift`` is a
channel's mean in the loader minus that in the source, ``e`` its standard error. A layer's channels
together show how far the data have really moved, ``t^2 = mean of (shift^2 - e^2)``, not below 0.
The best linear estimate of a mean moves from the source's by ``t^2 / (t^2 + e^2)`` of the shift (an
empirical Bayes estimate). Logarithms of variances go the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnstats.recomputation.estimators import Estimate
from bnstats.recomputation.layer_stats import LayerStats, of_one_unit, with_eps


class Shrunk(NamedTuple):
    """What a layer is to normalize with, and how much its samples differ.

    Attributes:
        estimate: the weighted statistics, their weights and standard errors.
        relative_spread: variance between samples' means over the source's, averaged over the
            channels; NaN for one sample.
    """

    estimate: Estimate
    relative_spread: float


def shrink(source: LayerStats, loader: Estimate, eps: float) -> Shrunk:
    """Return the weighted statistics of the source and of a loader.

    The unit is the sample, as the values of one sample are correlated. Its variance is too small by
    the variance of its mean, of which the share ``1 / k`` is added. What differs between samples is
    the source's spread, channel by channel, scaled for the whole layer by how much the loader's own
    differs, where the source counts as one sample; the errors are not let below the source's.

    Args:
        source: with the spread between its samples.
        loader: the same of the loader, its variance biased.
        eps: the layer's.
    """
    source_mean, source_var = source.mean.to(loader.mean), source.var.to(loader.mean)
    square = with_eps(source_var, eps)
    # Of one sample: the variances of its mean and of its mean square, relative.
    of_mean, of_var = source.sample_covariance.to(loader.mean).diagonal(dim1=1, dim2=2).unbind(1)
    of_mean, of_var = of_mean / square, of_var / square.square()
    num_samples = int(loader.num_samples[0])
    own = of_one_unit(loader.sample_spread, num_samples).diagonal(dim1=1, dim2=2)
    share = loader.sample_spread[:, 0, 0] / loader.num_values.square()  # 1 / k for samples alike

    relative_spread = _ratio(own[:, 0] / square, of_mean)
    scale = _scale(relative_spread, num_samples)
    var = loader.var + scale * of_mean * square * share
    shift = (loader.mean - source_mean) / square.sqrt()
    mean_error = max(scale, 1.0) * of_mean * share
    mean_weight = _weight(shift, mean_error)

    log_ratio = (with_eps(var, eps) / square).log()
    scale = _scale(_ratio(own[:, 1] / with_eps(var, eps).square(), of_var), num_samples)
    var_error = max(scale, 1.0) * of_var * share
    var_weight = _weight(log_ratio, var_error)
    if int(loader.num_values[0]) < 2:
        # With a single value a shift cannot be distinguished from the spread.
        mean_weight = var_weight = torch.zeros_like(mean_weight)

    weighted_square = square * (var_weight * log_ratio).exp()
    unknown = torch.full_like(shift, torch.nan)
    estimate = loader._replace(
        mean=source_mean + mean_weight * (loader.mean - source_mean),
        var=torch.where(var_weight == 0, source_var, (weighted_square - eps).clamp(min=0)),
        mean_stderr=(mean_weight * mean_error * square).sqrt(),
        var_stderr=(var_weight * var_error).sqrt() * weighted_square,
        mean_var_cov=unknown,
        spread=torch.full_like(loader.spread, torch.nan),
        num_samples=torch.zeros_like(shift),  # of what is mixed it is not known
        sample_spread=torch.zeros_like(loader.spread),
        mean_weight=mean_weight.expand_as(shift),
        var_weight=var_weight.expand_as(shift),
    )
    return Shrunk(estimate, relative_spread)


def _weight(shift: Tensor, squared_error: Tensor) -> Tensor:
    """Return the weight of the loader's statistics, one for all channels."""
    error = squared_error.mean()
    moved = (shift.square() - squared_error).mean().clamp(min=0)
    return torch.where(moved > 0, moved / (moved + error), 0)


def _ratio(own: Tensor, source: Tensor) -> float:
    """Return the loader's spread over the source's; 1 where the source has none."""
    of_source = float(source.mean())
    return float(own.mean()) / of_source if of_source > 0 else 1.0


def _scale(ratio: float, num_samples: int) -> float:
    """Return the ratio averaged with the source's 1, which counts as one sample."""
    return 1.0 if num_samples < 2 else (1 + (num_samples - 1) * ratio) / num_samples
