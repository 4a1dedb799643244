"""Collecting the moments of several layers, batch by batch, in one flat state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bnstats.errors import NonFiniteStatisticsError, TooFewValuesError
from bnstats.moments import Moments
from bnstats.recompute.batches import Reader
from bnstats.recompute.estimators import ESTIMATORS, Estimator
from bnstats.recompute.stage import Seen, StagedLayer
from bnstats.recompute.task import Tally, Task


class Collector:
    """One estimator for several layers, their channels laid end to end.

    So laid, what the layers saw of a batch is taken in by a handful of operations, however many
    layers there are.

    Args:
        task: what is measured.
        layers: the layers, some or all of the task's.

    Attributes:
        layers: the layers.
        num_skipped: batches left out so far.
    """

    def __init__(self, task: Task, layers: Sequence[StagedLayer]) -> None:
        self.num_skipped = 0
        self._task = task
        self.layers = layers
        self._num_batches = 0
        self._channels = [layer.num_features for layer in layers]
        self._corrections = [task.correction_of(layer) for layer in layers]
        self._seen: dict[StagedLayer, Seen] = {}
        self._nothing = task.like.new_zeros(sum(self._channels))
        devices = {layer.module.running_mean.device for layer in layers}  # type: ignore[union-attr]
        self._elsewhere = devices != {self._nothing.device}
        self._expanded: tuple[list[int], Tensor] = ([], torch.empty(0))
        self._estimator = self._new_estimator()

    def visit(self, layer: StagedLayer, input: Tensor) -> None:
        """Take the moments of one call; the layer normalizes with this call's own."""
        seen = layer.observe(input)
        layer.normalize_with(seen.mean, seen.m2 / max(seen.num_values, 1))
        self.take(layer, seen)

    def take(self, layer: StagedLayer, seen: Seen) -> None:
        """Take the moments of one call."""
        if self._elsewhere:
            seen = Seen(seen.num_values, *(x.to(self._nothing.device) for x in seen[1:]))
        before = self._seen.get(layer)
        self._seen[layer] = seen if before is None else before.merge(seen)

    def close_batch(self) -> None:
        """Take in what the layers saw of a batch: all of it, or nothing."""
        unseen = zip(self.layers, self._nothing.split(self._channels), strict=True)
        seen = [self._seen.get(layer, Seen(0, zeros, zeros)) for layer, zeros in unseen]
        flat = torch.cat([x.mean for x in seen] + [x.m2 for x in seen])
        # The sum is the cheaper question; that of finite numbers can be infinite.
        if math.isfinite(flat.sum()) or flat.isfinite().all():
            counts = [x.num_values for x in seen]
            self._check_enough_values(counts)
            self._estimator.add(Moments(self._expand(counts), *flat.view(2, -1)))
        elif self._task.skip_nonfinite:
            self.num_skipped += 1
        else:
            self._raise_nonfinite()
        self._num_batches += 1
        self._seen = {}

    def state(self, reader: Reader) -> Tensor:
        """Return all that was collected, and how many batches that were, as one vector."""
        tally = Tally.of(reader, self.num_skipped)
        return torch.cat([self._nothing.new_tensor(tally), self._estimator.state().flatten()])

    def together(self, states: Tensor) -> tuple[Tally, Estimator]:
        """Return the tally and the estimator of all processes, from their states."""
        tally = Tally(*states[:, : len(Tally._fields)].sum(0).tolist())
        if len(states) == 1:
            return tally, self._estimator
        estimator = self._new_estimator()
        width = sum(self._channels)
        for state in states:
            estimator.absorb(state[len(Tally._fields) :].unflatten(0, (-1, width)))
        return tally, estimator

    def _new_estimator(self) -> Estimator:
        make = ESTIMATORS.get(self._task.method, ESTIMATORS["pooled"])
        return make(self._expand(self._corrections), self._nothing)

    def _expand(self, numbers: list[int]) -> Tensor:
        """Return one number per layer as one per channel; the last answer is kept."""
        if self._expanded[0] != numbers:
            values = torch.tensor(numbers, dtype=self._nothing.dtype)
            values = values.repeat_interleave(torch.tensor(self._channels))
            self._expanded = (list(numbers), values.to(self._nothing.device))
        return self._expanded[1]

    def _check_enough_values(self, counts: list[int]) -> None:
        if not self._estimator.averages_variances:
            return
        for layer, count, correction in zip(self.layers, counts, self._corrections, strict=True):
            if 0 < count <= correction:
                raise TooFewValuesError(
                    f"layer '{layer.name}' saw {count} value per channel in batch "
                    f"{self._num_batches}: an unbiased batch variance needs two; use "
                    'method="pooled", which needs no batch variance, or correction=0'
                )

    def _raise_nonfinite(self) -> None:
        names = [
            layer.name
            for layer, seen in self._seen.items()
            if not (seen.mean + seen.m2).isfinite().all()
        ]
        raise NonFiniteStatisticsError(
            f"batch {self._num_batches} (counted from 0) has non-finite statistics in "
            f"{len(names)} layers, the first '{names[0]}', all: {', '.join(map(repr, names))}; "
            'mend the data or pass on_nonfinite="skip"; the model is as it was'
        )
