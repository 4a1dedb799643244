"""The statistics of one layer: a population's, and those that the layer runs with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidValueError
from bnstats.moments import Moments


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Population statistics of one layer's input; tensors are float64, of shape (C,).

    Attributes:
        count: values per channel.
        num_batches: batches in which the layer saw values.
        mean: mean per channel; 0 for a layer that keeps its statistics about zero.
        var: variance per channel, divided by ``count - correction``; the mean square for a
            layer that keeps its statistics about zero.
        mean_stderr: standard error of ``mean`` in its own unit, from the spread between
            batches; NaN with fewer than two batches.
        var_stderr: the same of ``var``.
        correction: 1 where ``var`` is unbiased, 0 where it is not.

    Example:
        >>> import torch, bnstats
        >>> data = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> stats = bnstats.measure_population_stats(torch.nn.BatchNorm1d(1), data.split(2))[""]
        >>> stats.count, stats.num_batches, stats.mean.item(), stats.mean_stderr.item()
        (4, 2, 3.0, 1.5)
    """

    count: int
    num_batches: int
    mean: Tensor
    var: Tensor
    mean_stderr: Tensor
    var_stderr: Tensor
    correction: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.shape != (self.num_features,):
                raise InvalidValueError(
                    f"LayerStats: {field.name}: expected shape ({self.num_features},), got "
                    f"{tuple(value.shape)}"
                )

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return self.mean.numel()

    @property
    def moments(self) -> Moments:
        """The statistics as mergeable moments; meant for pooled ones."""
        return Moments(
            torch.tensor(self.count), self.mean, self.var * (self.count - self.correction)
        )

    def merge(self, other: LayerStats) -> LayerStats:
        """Return the pooled statistics of the values of both.

        The standard errors are combined as those of two strata: exact where each was measured
        on its own share of the data.
        """
        total = self.moments + other.moments
        count = int(total.count)
        mean_error, var_error = torch.zeros_like(self.mean), torch.zeros_like(self.var)
        for part in (self, other):
            share = part.count / max(count, 1)
            shift = part.mean - total.mean
            mean_error += (share * part.mean_stderr).square()
            var_error += share**2 * (
                part.var_stderr.square() + (2 * shift * part.mean_stderr).square()
            )
        return replace(
            self,
            count=count,
            num_batches=self.num_batches + other.num_batches,
            mean=total.mean,
            var=total.var(self.correction),
            mean_stderr=mean_error.sqrt(),
            var_stderr=var_error.sqrt(),
        )


class RunningStats(NamedTuple):
    """A layer's running mean and variance, each of shape (C,).

    Example:
        >>> import torch, bnstats
        >>> bnstats.RunningStats.of(torch.nn.BatchNorm1d(2)).var.tolist()
        [1.0, 1.0]
    """

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, layer: _BatchNorm) -> RunningStats:
        """Return a copy of a layer's running statistics."""
        assert layer.running_mean is not None and layer.running_var is not None
        return cls(layer.running_mean.clone(), layer.running_var.clone())

    @torch.no_grad()
    def write_to(self, layer: _BatchNorm) -> None:
        """Copy the values into the layer's own buffers."""
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.var)


def write_all(
    layers: Mapping[str, _BatchNorm],
    after: Mapping[str, LayerStats],
    before: Mapping[str, RunningStats],
) -> None:
    """Write the statistics of all layers; if one fails, what was before is back in all."""
    try:
        for name, layer in layers.items():
            RunningStats(after[name].mean, after[name].var).write_to(layer)
    except BaseException:
        for name, layer in layers.items():
            before[name].write_to(layer)
        raise
