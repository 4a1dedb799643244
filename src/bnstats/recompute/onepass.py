"""The methods of one pass, which normalize each batch by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from torch import Tensor

from bnstats.recompute.collector import Collector
from bnstats.recompute.estimators import Estimate
from bnstats.recompute.population import PopulationStats
from bnstats.recompute.results import population_stats
from bnstats.recompute.stage import staged
from bnstats.recompute.stopping import looks, precise
from bnstats.recompute.task import Tally, Task


def one_pass(task: Task) -> PopulationStats:
    """Measure with ``"pooled"``, ``"batch_average"`` or ``"ema"``."""
    collector = Collector(task, task.layers)
    with staged(task.model, task.layers, collector.visit):
        tally, estimate = collect(task, collector, task.forward, progress=task.progress)
    return population_stats(task, tally, estimate)


def collect(
    task: Task, collector: Collector, forward: Callable[[Any], object], *, progress: bool = False
) -> tuple[Tally, Estimate]:
    """Read the loader until its end, or until the collector's layers are known well enough.

    Args:
        task: what is measured; with others, together.
        collector: is told by the forwards of what the layers see.
        forward: from a batch to a forward of the model.
        progress: show a progress bar.
    """

    def read(until: float) -> Tensor:
        for batch in reader.read(until):
            forward(batch)
            collector.close_batch()
        return collector.state(reader)

    with closing(task.reader(progress=progress)) as reader:
        # One number, expanded: a state of its own would take memory beside the activations.
        like = task.like.new_zeros(1).expand_as(collector.state(reader))
        for look in looks(task.tolerance):
            states = task.peers.gather(partial(read, look), like=like)
            tally, estimator = collector.together(states)
            estimate = estimator.estimate(tally.fraction)
            if tally.num_exhausted == task.peers.size:
                break
            if precise(estimate, collector.layers, task.tolerance):
                break
    return tally, estimate
