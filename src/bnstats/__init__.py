"""Batch-norm statistics for PyTorch: exact, checked, fast.

The map:

- ``EMABatchNorm1d/2d/3d``: a drop-in BatchNorm with a debiased, pooled moving average.
- ``CumulativeBatchNorm1d/2d/3d``: exact statistics of all values since a reset.
- ``MovingAverageBatchNorm1d/2d/3d``: batch norm for batches of few values, behind
  ``CenteredConv1d/2d/3d`` and :class:`CenteredLinear`, layers whose weights have no mean.
- ``RenormBatchNorm1d/2d/3d``: batch renormalization, training that follows evaluation.
- :func:`convert_batchnorm`: make the BatchNorm layers of an existing model those of a family,
  in place; :func:`revert_batchnorm` makes them torch's again.
- :func:`masked`: let padding count for nothing, in all layers of a model.
- :func:`recompute_population_stats`: replace a trained model's running statistics by the
  population statistics of its data; :func:`measure_population_stats` only measures, and
  :func:`observe` does so in forwards that you run.
- :func:`hold_statistics`: training forwards that move no statistics.
  :func:`freeze_statistics`: layers that normalize with theirs in every mode of the model,
  until :func:`thaw_statistics`.
- :func:`diagnose`: is it the batch norm? One verdict, its evidence, and the fix.
- :func:`record_batch_stats`: what batches do in training; :func:`plot_batch_stats`,
  :func:`plot_drift`: figures; :func:`estimate_running_error`: how good an average can be.
- :class:`Moments`: the mergeable count, mean and sum of squared deviations that all of it
  stands on.
- :mod:`bnstats.errors`: what is raised, each error also a builtin one.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING

from bnstats.conversion import convert_batchnorm, revert_batchnorm
from bnstats.diagnosis import (
    BatchStatsRecord,
    Diagnosis,
    LayerRecord,
    RunningError,
    diagnose,
    estimate_running_error,
    plot_batch_stats,
    plot_drift,
    record_batch_stats,
)
from bnstats.errors import BnstatsError, BnstatsWarning
from bnstats.freezing import freeze_statistics, thaw_statistics
from bnstats.holding import hold_statistics
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
    RenormBatchNorm,
    RenormBatchNorm1d,
    RenormBatchNorm2d,
    RenormBatchNorm3d,
    masked,
)
from bnstats.moments import Moments
from bnstats.recomputation import (
    Drift,
    DriftReport,
    LayerStats,
    Observation,
    PopulationStats,
    Recalibration,
    RunningStats,
    measure_population_stats,
    observe,
    recompute_population_stats,
)

__all__ = [
    "BatchStatsRecord",
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
    "Diagnosis",
    "Drift",
    "DriftReport",
    "EMABatchNorm",
    "EMABatchNorm1d",
    "EMABatchNorm2d",
    "EMABatchNorm3d",
    "LayerRecord",
    "LayerStats",
    "Moments",
    "MovingAverageBatchNorm",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "Observation",
    "PopulationStats",
    "Recalibration",
    "RenormBatchNorm",
    "RenormBatchNorm1d",
    "RenormBatchNorm2d",
    "RenormBatchNorm3d",
    "RunningError",
    "RunningStats",
    "convert_batchnorm",
    "diagnose",
    "estimate_running_error",
    "freeze_statistics",
    "hold_statistics",
    "masked",
    "measure_population_stats",
    "observe",
    "plot_batch_stats",
    "plot_drift",
    "recompute_population_stats",
    "record_batch_stats",
    "revert_batchnorm",
    "thaw_statistics",
]

__version__ = "0.2.0"


def __dir__() -> list[str]:
    # What a prompt completes: not the packages behind the names, such as bnstats.conversion.
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__version__", "errors"])


if not TYPE_CHECKING:  # a type checker would take every name for one of the package's

    def __getattr__(name: str) -> object:
        # A name that is missing is often the first half of one, bnstats.convert, or one mistyped.
        # Tools ask for names of their own, with underscores: these are answered at once.
        near = [public for public in __all__ if public.startswith(f"{name}_")]
        if not near and not name.startswith("_"):
            near = get_close_matches(name, __all__, n=1, cutoff=0.8)
        hint = f"; there is {' and '.join(near)}" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
