"""Collecting the moments of several layers, batch by batch, in one flat state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnstats.errors import NonFiniteStatisticsError, TooFewValuesError
from bnstats.moments import Moments
from bnstats.recompute.batches import Reader
from bnstats.recompute.estimators import ESTIMATORS, Estimator
from bnstats.recompute.stage import StagedLayer
from bnstats.recompute.task import Tally, Task


class Collector:
    """One estimator for several layers, their channels laid end to end.

    A batch's moments are written into views of one flat tensor, so that taking a batch in costs
    a handful of operations, however many layers there are.

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
        self._position = {layer: position for position, layer in enumerate(layers)}
        self._num_batches = 0
        self._channels = [layer.num_features for layer in layers]
        self._corrections = [task.correction_of(layer) for layer in layers]
        self._flat = task.like.new_zeros(2, sum(self._channels))
        self._mean = self._flat[0].split(self._channels)
        self._m2 = self._flat[1].split(self._channels)
        self._counts = [0] * len(layers)
        self._expanded: tuple[list[int], Tensor] = ([], torch.empty(0))
        self._estimator = self._new_estimator()

    def visit(self, layer: StagedLayer, input: Tensor) -> None:
        """Take the moments of one call; the layer normalizes with this call's own."""
        moments = layer.moments(input)
        layer.normalize_with(moments.mean, moments.m2 / max(int(moments.count), 1))
        self.take(layer, moments)

    def take(self, layer: StagedLayer, moments: Moments) -> None:
        """Take the moments of one call."""
        position, count = self._position[layer], int(moments.count)
        if self._counts[position]:
            before = torch.tensor(self._counts[position])
            moments = Moments(before, self._mean[position], self._m2[position]) + moments
        self._counts[position] += count
        self._mean[position].copy_(moments.mean)
        self._m2[position].copy_(moments.m2)

    def close_batch(self) -> None:
        """Take in what the layers saw of a batch: all of it, or nothing."""
        if self._flat.isfinite().all():
            self._check_enough_values()
            # The estimator may keep what it is given: the views go on to the next batch.
            mean, m2 = self._flat.clone()
            self._estimator.add(Moments(self._expand(self._counts), mean, m2))
        elif self._task.skip_nonfinite:
            self.num_skipped += 1
        else:
            self._raise_nonfinite()
        self._num_batches += 1
        self._counts = [0] * len(self.layers)
        self._flat.zero_()

    def state(self, reader: Reader) -> Tensor:
        """Return all that was collected, and how many batches that were, as one vector."""
        tally = Tally.of(reader, self.num_skipped)
        return torch.cat([self._flat.new_tensor(tally), self._estimator.state().flatten()])

    def together(self, states: Tensor) -> tuple[Tally, Estimator]:
        """Return the tally and the estimator of all processes, from their states."""
        estimator = self._new_estimator()
        width = sum(self._channels)
        for state in states:
            estimator.absorb(state[len(Tally._fields) :].unflatten(0, (-1, width)))
        return Tally(*states[:, : len(Tally._fields)].sum(0).tolist()), estimator

    def _new_estimator(self) -> Estimator:
        make = ESTIMATORS.get(self._task.method, ESTIMATORS["pooled"])
        return make(self._expand(self._corrections), self._flat[0])

    def _expand(self, numbers: list[int]) -> Tensor:
        """Return one number per layer as one per channel; the last answer is kept."""
        if self._expanded[0] != numbers:
            values = torch.tensor(numbers, dtype=self._flat.dtype)
            values = values.repeat_interleave(torch.tensor(self._channels))
            self._expanded = (list(numbers), values.to(self._flat.device))
        return self._expanded[1]

    def _check_enough_values(self) -> None:
        if not self._estimator.averages_variances:
            return
        for layer, count, correction in zip(
            self.layers, self._counts, self._corrections, strict=True
        ):
            if 0 < count <= correction:
                raise TooFewValuesError(
                    f"layer '{layer.name}' saw {count} value per channel in batch "
                    f"{self._num_batches}: an unbiased batch variance needs two; use "
                    'method="pooled", which needs no batch variance, or correction=0'
                )

    def _raise_nonfinite(self) -> None:
        names = [
            layer.name
            for layer, mean, m2 in zip(self.layers, self._mean, self._m2, strict=True)
            if not (mean + m2).isfinite().all()
        ]
        raise NonFiniteStatisticsError(
            f"batch {self._num_batches} (counted from 0) has non-finite statistics in "
            f"{len(names)} layers, the first '{names[0]}', all: {', '.join(map(repr, names))}; "
            'mend the data or pass on_nonfinite="skip"; the model is as it was'
        )
