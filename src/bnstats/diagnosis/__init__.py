"""Looking at statistics: what is wrong with them, and what batches do in training."""

from bnstats.diagnosis.plots import plot_batch_stats, plot_drift
from bnstats.diagnosis.record import BatchStatsRecord, LayerRecord, record_batch_stats
from bnstats.diagnosis.run import diagnose
from bnstats.diagnosis.running_error import RunningError, estimate_running_error
from bnstats.diagnosis.verdict import Diagnosis

__all__ = [
    "BatchStatsRecord",
    "Diagnosis",
    "LayerRecord",
    "RunningError",
    "diagnose",
    "estimate_running_error",
    "plot_batch_stats",
    "plot_drift",
    "record_batch_stats",
]
