"""The pass over data after training: population statistics, exact and checked."""

from bnstats.recomputation.drift import Drift, DriftReport
from bnstats.recomputation.layer_stats import LayerStats, RunningStats
from bnstats.recomputation.observing import Observation, observe
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.recalibration import Recalibration
from bnstats.recomputation.run import measure_population_stats, recompute_population_stats

__all__ = [
    "Drift",
    "DriftReport",
    "LayerStats",
    "Observation",
    "PopulationStats",
    "Recalibration",
    "RunningStats",
    "measure_population_stats",
    "observe",
    "recompute_population_stats",
]
