"""Collecting the moments of all layers, batch by batch, in one flat state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bnstats.errors import (
    BnstatsWarning,
    InvalidValueError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)
from bnstats.moments import Moments
from bnstats.recompute.estimators import Estimate, Estimator
from bnstats.recompute.population import LayerStats
from bnstats.recompute.stage import StagedLayer
from bnstats.reduction import wide_dtype


class Collector:
    """One estimator for all layers, their channels laid end to end.

    A batch's moments are written into views of one flat tensor, so that taking a batch in costs
    a handful of operations, however many layers there are.

    Args:
        layers: the staged layers.
        make_estimator: from (correction, like) to an estimator.
        correction: as the caller asked; a layer that keeps its statistics about zero estimates
            no mean, and so has none.
        skip_nonfinite: leave a batch out that is not finite somewhere, instead of raising.

    Attributes:
        num_skipped: batches left out so far.
    """

    def __init__(
        self,
        layers: Sequence[StagedLayer],
        make_estimator: Callable[[Tensor, Tensor], Estimator],
        *,
        correction: int,
        skip_nonfinite: bool,
    ) -> None:
        self.num_skipped = 0
        self._layers = layers
        self._skip_nonfinite = skip_nonfinite
        self._num_batches = 0
        self._channels = [layer.module.num_features for layer in layers]
        self._corrections = [0 if layer.about_zero else correction for layer in layers]
        device = layers[0].module.running_mean.device  # type: ignore[union-attr]
        self._flat = torch.zeros(2, sum(self._channels), dtype=wide_dtype(device), device=device)
        self._mean = self._flat[0].split(self._channels)
        self._m2 = self._flat[1].split(self._channels)
        self._counts = [0] * len(layers)
        self._expanded: tuple[list[int], Tensor] = ([], torch.empty(0))
        self._estimator = make_estimator(self._expand(self._corrections), self._flat[0])

    def visit(self, layer: StagedLayer, moments: Moments) -> None:
        """Take the moments of one call; the layer normalizes with this call's own."""
        index, count = layer.index, int(moments.count)
        layer.normalize_with(moments.mean, moments.m2 / max(count, 1))
        if self._counts[index]:
            before = torch.tensor(self._counts[index])
            moments = Moments(before, self._mean[index], self._m2[index]) + moments
        self._counts[index] += count
        self._mean[index].copy_(moments.mean)
        self._m2[index].copy_(moments.m2)

    def close_batch(self) -> None:
        """Take in what the layers saw of a batch: all of it, or nothing."""
        if self._flat.isfinite().all():
            self._check_enough_values()
            # The estimator may keep what it is given: the views go on to the next batch.
            mean, m2 = self._flat.clone()
            self._estimator.add(Moments(self._expand(self._counts), mean, m2))
        elif self._skip_nonfinite:
            self.num_skipped += 1
        else:
            self._raise_nonfinite()
        self._num_batches += 1
        self._counts = [0] * len(self._layers)
        self._flat.zero_()

    def finish(self) -> dict[str, LayerStats]:
        """Return the statistics of every layer that saw values, and warn of the others."""
        if not self._num_batches:
            raise InvalidValueError(
                "loader: expected at least one batch, got none; an iterator that was read "
                "before gives none"
            )
        if self.num_skipped == self._num_batches:
            raise NonFiniteStatisticsError(
                f"all {self._num_batches} batches had non-finite statistics and were skipped"
            )
        estimate = self._estimator.estimate()
        parts = [[*part.cpu().split(self._channels)] for part in estimate]
        stats: dict[str, LayerStats] = {}
        unseen = []
        for layer in self._layers:
            part = Estimate(*(column[layer.index].clone() for column in parts))
            if int(part.num_values[0]) == 0:
                unseen.append(layer.name)
            else:
                stats[layer.name] = self._layer_stats(layer, part)
        if unseen:
            warnings.warn(
                "no batch reached these layers, whose statistics are left alone: "
                + ", ".join(map(repr, unseen)),
                BnstatsWarning,
                stacklevel=4,
            )
        return stats

    def _layer_stats(self, layer: StagedLayer, part: Estimate) -> LayerStats:
        count, correction = int(part.num_values[0]), self._corrections[layer.index]
        if count <= correction:
            raise TooFewValuesError(
                f"layer '{layer.name}' saw {count} value per channel: its unbiased variance "
                "needs two; give more data, or correction=0"
            )
        return LayerStats(
            count=count,
            num_batches=int(part.num_batches[0]),
            mean=part.mean,
            var=part.var,
            mean_stderr=part.mean_stderr,
            var_stderr=part.var_stderr,
            correction=correction,
        )

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
            self._layers, self._counts, self._corrections, strict=True
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
            for layer in self._layers
            if not (self._mean[layer.index] + self._m2[layer.index]).isfinite().all()
        ]
        raise NonFiniteStatisticsError(
            f"batch {self._num_batches} (counted from 0) has non-finite statistics in "
            f"{len(names)} layers, the first '{names[0]}', all: {', '.join(map(repr, names))}; "
            'mend the data or pass on_nonfinite="skip"; the model is as it was'
        )
