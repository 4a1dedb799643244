"""Batch-norm statistics for PyTorch: exact, checked, fast.

The map:

- :class:`EMABatchNorm2d` and its family: a drop-in BatchNorm with a debiased, pooled moving
  average. :class:`CumulativeBatchNorm2d` and its: exact statistics of all values since a reset.
- :class:`MovingAverageBatchNorm2d` and its: batch norm for batches of few values, behind
  :class:`CenteredConv2d` and :class:`CenteredLinear`, layers whose weights have no mean.
- :func:`convert_batchnorm`: make the BatchNorm layers of an existing model those of a family,
  in place; :func:`revert_batchnorm` makes them torch's again.
- :func:`recompute_population_stats`: replace a trained model's running statistics by the
  population statistics of its data; :func:`measure_population_stats` only measures.
- :class:`Moments`: the mergeable count, mean and sum of squares that all of it stands on.
- :mod:`bnstats.errors`: what is raised, each error also a builtin one.
"""

from bnstats.convert import convert_batchnorm, revert_batchnorm
from bnstats.errors import BnstatsError, BnstatsWarning
from bnstats.layers import (
    CenteredConv1d,
    CenteredConv2d,
    CenteredConv3d,
    CenteredLinear,
    CumulativeBatchNorm,
    CumulativeBatchNorm1d,
    CumulativeBatchNorm2d,
    CumulativeBatchNorm3d,
    EMABatchNorm,
    EMABatchNorm1d,
    EMABatchNorm2d,
    EMABatchNorm3d,
    MovingAverageBatchNorm,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from bnstats.moments import Moments
from bnstats.recompute import (
    Drift,
    LayerStats,
    PopulationStats,
    Recalibration,
    RunningStats,
    measure_population_stats,
    recompute_population_stats,
)

__all__ = [
    "BnstatsError",
    "BnstatsWarning",
    "CenteredConv1d",
    "CenteredConv2d",
    "CenteredConv3d",
    "CenteredLinear",
    "CumulativeBatchNorm",
    "CumulativeBatchNorm1d",
    "CumulativeBatchNorm2d",
    "CumulativeBatchNorm3d",
    "Drift",
    "EMABatchNorm",
    "EMABatchNorm1d",
    "EMABatchNorm2d",
    "EMABatchNorm3d",
    "LayerStats",
    "Moments",
    "MovingAverageBatchNorm",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "PopulationStats",
    "Recalibration",
    "RunningStats",
    "convert_batchnorm",
    "measure_population_stats",
    "recompute_population_stats",
    "revert_batchnorm",
]

__version__ = "0.1.0"
