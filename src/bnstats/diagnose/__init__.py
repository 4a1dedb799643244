"""Looking at statistics: what batches do in training, and how far running averages are off."""

from bnstats.diagnose.plots import plot_batch_stats, plot_drift
from bnstats.diagnose.record import BatchStatsRecord, LayerRecord, record_batch_stats
from bnstats.diagnose.running_error import RunningError, estimate_running_error

__all__ = [
    "BatchStatsRecord",
    "LayerRecord",
    "RunningError",
    "estimate_running_error",
    "plot_batch_stats",
    "plot_drift",
    "record_batch_stats",
]
