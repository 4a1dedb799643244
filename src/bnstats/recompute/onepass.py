"""The methods of one pass, which normalize each batch by itself."""

from __future__ import annotations

from contextlib import closing
from functools import partial

from torch import Tensor

from bnstats.recompute.collector import Collector
from bnstats.recompute.population import PopulationStats
from bnstats.recompute.results import population_stats
from bnstats.recompute.stage import staged
from bnstats.recompute.stopping import looks, precise
from bnstats.recompute.task import Task


def one_pass(task: Task) -> PopulationStats:
    """Measure with ``"pooled"``, ``"batch_average"`` or ``"ema"``."""
    collector = Collector(task, task.layers)

    def read(until: float) -> Tensor:
        for batch in reader.read(until):
            task.forward(batch)
            collector.close_batch()
        return collector.state(reader)

    with closing(task.reader()) as reader, staged(task.model, task.layers, collector.visit):
        for look in looks(task.tolerance):
            states = task.peers.gather(partial(read, look), like=collector.state(reader))
            tally, estimator = collector.together(states)
            estimate = estimator.estimate(tally.fraction)
            if tally.num_exhausted == task.peers.size or precise(estimate, task):
                break
    return population_stats(task, tally, estimate)
