"""The pass over data after training: population statistics, exact and checked."""

from bnstats.recompute.drift import Drift, DriftReport
from bnstats.recompute.layer_stats import LayerStats, RunningStats
from bnstats.recompute.observing import Observation, observe
from bnstats.recompute.population import PopulationStats
from bnstats.recompute.recalibration import Recalibration
from bnstats.recompute.run import measure_population_stats, recompute_population_stats

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
