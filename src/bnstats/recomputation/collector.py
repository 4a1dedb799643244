"""Collecting the moments of several layers, batch by batch, in one flat state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from bnstats.errors import InvalidValueError, NonFiniteStatisticsError
from bnstats.formatting import counted
from bnstats.moments import Moments
from bnstats.recomputation.batches import BatchCounts, Reader
from bnstats.recomputation.estimators import Estimate, Estimator
from bnstats.recomputation.layer_stats import with_eps
from bnstats.recomputation.observer import LayerMoments, ObservedLayer, observed
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.results import population_stats
from bnstats.recomputation.spread import STATE_ROWS
from bnstats.recomputation.task import Task

FIRST_CHECK = 8
"""Batches before the first check of the errors: fewer do not estimate a spread."""


class Collector:
    """One estimator for several layers, their channels laid end to end.

    So laid, what the layers saw of a batch is merged in by a handful of operations, however many
    layers there are.

    Args:
        task: what is measured.
        layers: the layers, some or all of the task's.

    Attributes:
        layers: the layers.
        num_skipped: batches left out so far.
    """

    def __init__(self, task: Task, layers: Sequence[ObservedLayer]) -> None:
        self.num_skipped: int | Tensor = 0
        self._task = task
        self.layers = layers
        self._num_batches = 0
        self._channels = [layer.num_features for layer in layers]
        self._corrections = [task.correction_of(layer) for layer in layers]
        self._moments: dict[ObservedLayer, LayerMoments] = {}
        self._threads: dict[ObservedLayer, int] = {}
        self._zeros = task.like.new_zeros(sum(self._channels))
        self._several_devices = {x.running_mean.device for x in layers} != {self._zeros.device}
        self._expanded: tuple[list[int], Tensor] = ([], self._zeros)
        self._estimator = self._new_estimator(self._zeros.device)

    def on_input(self, layer: ObservedLayer, input: Tensor) -> None:
        """Add the moments of one call, and let the layer normalize with them."""
        moments = layer.moments_of(input)
        self.add(layer, moments)
        layer.normalize_with_batch(moments)

    def add(self, layer: ObservedLayer, moments: LayerMoments) -> None:
        """Add the moments of one call."""
        if self._threads.setdefault(layer, get_ident()) != get_ident():
            raise InvalidValueError(
                f"layer '{layer.name}' runs in several threads of one forward, where one would "
                "normalize with what another has written: expected a layer's calls to follow one "
                "another in one thread; pass forward=lambda model, batch: ... that runs them so"
            )
        if self._several_devices:
            moments = moments.to(self._zeros.device)
        before = self._moments.get(layer)
        self._moments[layer] = moments if before is None else before.merge(moments)

    def end_batch(self) -> None:
        """Merge in what the layers saw of a batch: all of it, or nothing."""
        moments, flat = self._batch()
        # The sum is the cheaper question; that of finite numbers can be infinite.
        if math.isfinite(flat.sum()) or flat.isfinite().all():
            batch = Moments(self._expand([x.num_values for x in moments]), *flat.view(2, -1))
            self._estimator.add(batch, self._samples(moments))
        elif self._task.options.on_nonfinite == "skip":
            self.num_skipped += 1
        else:
            self._raise_nonfinite()
        self._num_batches += 1
        self._moments, self._threads = {}, {}

    def end_batch_unasked(self) -> None:
        """Merge it in, or skip it, by tensors alone: the host does not wait for a device."""
        moments, flat = self._batch()
        finite = flat.isfinite().all()
        values = torch.where(finite, flat, 0).view(2, -1)
        counts = self._expand([x.num_values for x in moments])
        self._estimator.add(Moments(counts * finite, *values))
        self.num_skipped = self.num_skipped + ~finite
        self._num_batches += 1
        self._moments, self._threads = {}, {}

    def _batch(self) -> tuple[list[LayerMoments], Tensor]:
        """Return each layer's moments, and all means and m2 end to end."""
        unseen = zip(self.layers, self._zeros.split(self._channels), strict=True)
        moments = [self._moments.get(x, LayerMoments(0, zeros, zeros)) for x, zeros in unseen]
        flat = torch.cat([x.mean for x in moments] + [x.m2 for x in moments])
        return moments, flat

    def estimate(self) -> Estimate:
        """Return what this process alone has collected, as a sample from something larger."""
        return self._estimator.estimate()

    def _samples(self, moments: Sequence[LayerMoments]) -> Tensor | None:
        """Return the spread between a batch's samples, the layers end to end; None if not taken."""
        if self.layers[0].reference is None:
            return None
        unseen = self._zeros.expand(STATE_ROWS, -1).split(self._channels, dim=1)
        states = zip((x.samples for x in moments), unseen, strict=True)
        return torch.cat([none if state is None else state for state, none in states], dim=1)

    def empty_state(self) -> Tensor:
        """Return a tensor like every state, which takes no memory."""
        num_rows = len(self._estimator.state())
        return self._zeros.new_zeros(()).expand(
            len(BatchCounts._fields) + num_rows * len(self._zeros)
        )

    def state(self, reader: Reader) -> Tensor:
        """Return all that was collected, and from how many batches, as one vector."""
        counts = BatchCounts.of(reader, int(self.num_skipped))
        return torch.cat([self._zeros.new_tensor(counts), self._estimator.state().flatten()])

    def merge_states(self, states: Tensor) -> tuple[BatchCounts, Estimator]:
        """Return the counts and the estimator of all processes, from their states."""
        width = len(BatchCounts._fields)
        counts = BatchCounts(*states[:, :width].sum(0).tolist())
        if len(states) == 1:
            return counts, self._estimator
        estimator = self._new_estimator(states.device)
        for state in states:
            estimator.merge_state(state[width:].unflatten(0, (-1, len(self._zeros))))
        return counts, estimator

    def _new_estimator(self, device: torch.device) -> Estimator:
        corrections = self._expand(self._corrections).to(device)
        return self._task.new_estimator(corrections, self._zeros.to(device))

    def _expand(self, numbers: list[int]) -> Tensor:
        """Repeat one number per layer for its channels; the last result is cached."""
        if self._expanded[0] != numbers:
            values = torch.tensor(numbers, dtype=self._zeros.dtype, device="cpu")
            values = values.repeat_interleave(torch.tensor(self._channels, device="cpu"))
            self._expanded = (list(numbers), values.to(self._zeros.device))
        return self._expanded[1]

    def _raise_nonfinite(self) -> None:
        names = [x.name for x, moments in self._moments.items() if not moments.is_finite()]
        raise NonFiniteStatisticsError(
            f"batch {self._num_batches} (counted from 0) has non-finite statistics in "
            f"{counted(len(names), 'layer')}, the first '{names[0]}', all: "
            f"{', '.join(map(repr, names))}; "
            'repair the data or pass on_nonfinite="skip"; the model is as it was'
        )


def one_pass(task: Task) -> PopulationStats:
    """Measure with ``"pooled"``, ``"batch_average"`` or ``"ema"``."""
    collector = Collector(task, task.layers)
    with observed(task.model, task.layers, collector.on_input):
        counts, estimate = collect(task, collector, task.forward, progress=task.options.progress)
    return population_stats(task, counts, estimate)


def collect(
    task: Task,
    collector: Collector,
    forward: Callable[[Any], object],
    *,
    prepare: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> tuple[BatchCounts, Estimate]:
    """Read the loader until its end, or until the errors are at most the task's tolerance.

    Args:
        task: what is measured; with others, together.
        collector: observes the layers in the forwards.
        forward: from a batch to a forward of the model.
        prepare: is called before, where an error of one process is shared with the others.
        progress: show a progress bar.
    """
    with closing(task.reader(progress=progress)) as reader:
        for until in batches_before_checks(task.options.tolerance):
            with task.peers.exchange(collector.empty_state()) as exchange:
                if not reader.num_read:
                    prepare()
                for batch in task.read(reader, until):
                    task.interrupts.call(forward, batch)
                    collector.end_batch()
                exchange.send(collector.state(reader))
            counts, estimator = collector.merge_states(exchange.results)
            estimate = estimator.estimate(counts.fraction)
            if counts.num_exhausted == task.peers.size:
                break
            if within_tolerance(estimate, collector.layers, task.options.tolerance):
                break
    return counts, estimate


def batches_before_checks(tolerance: float | None) -> Iterator[float]:
    """Yield after how many batches to check the errors: every 4th, then an eighth part more.

    A check costs as much as merging the moments of some ten batches, which is negligible at
    this frequency.
    """
    if tolerance is not None:
        num_batches = FIRST_CHECK
        while True:
            yield num_batches
            num_batches += max(4, num_batches // 8)
    yield math.inf


def within_tolerance(
    estimate: Estimate, layers: Sequence[ObservedLayer], tolerance: float | None
) -> bool:
    """Whether the standard errors of every layer are at most the tolerance.

    Of the mean in standard deviations, of the variance relative, both with eps in the variance
    as in :class:`bnstats.Drift`, and each as its root mean square over the layer's channels.
    Layers that no batch has reached yet do not count.

    Args:
        estimate: of the layers, their channels laid end to end.
        layers: the layers.
        tolerance: the largest standard error that is accepted; None accepts none.
    """
    if tolerance is None:
        return False
    if not (estimate.num_values > 0).any():
        return False  # no layer was reached yet
    columns = zip(*(part.split([x.num_features for x in layers]) for part in estimate), strict=True)
    errors = []
    for layer, column in zip(layers, columns, strict=True):
        part = Estimate(*column)
        square = with_eps(part.var, layer.module.eps)
        of_mean = (part.mean_stderr.square() / square).mean()
        of_var = (part.var_stderr / square).square().mean()
        reached = part.num_values[0] > 0
        errors += [torch.where(reached, of_mean, 0), torch.where(reached, of_var, 0)]
    # NaN, from a single batch, compares as too large.
    return bool((torch.stack(errors) <= tolerance**2).all())
