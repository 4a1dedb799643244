"""The statistics of one layer: a population's, and those that the layer runs with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        eps: what the layer adds to a variance before it divides by its root.

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
    eps: float = field(default=1e-5, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.shape != (self.num_features,):
                raise InvalidValueError(
                    f"LayerStats: {name}: expected shape ({self.num_features},), got "
                    f"{tuple(value.shape)}"
                )

    def check_values(self) -> None:
        """Refuse what no measurement gives: negative, complex, not finite, out of range.

        Standard errors may be NaN: that of a single batch is not known.

        Raises:
            InvalidValueError: a value is not possible; the message names it.
        """
        for name, least in (("count", 1), ("num_batches", 1), ("correction", 0), ("eps", 0)):
            value = getattr(self, name)
            kinds = (int, float) if name == "eps" else (int,)
            if not isinstance(value, kinds) or not least <= value < math.inf:
                raise InvalidValueError(f"{name}: expected a number from {least}, got {value!r}")
        if self.correction > 1:
            raise InvalidValueError(f"correction: expected 0 or 1, got {self.correction}")
        for name in ("mean", "var", "mean_stderr", "var_stderr"):
            value = getattr(self, name)
            if value.dtype not in (torch.float64, torch.float32):
                raise InvalidValueError(f"{name}: expected float64, got {value.dtype}")
            known = value[~value.isnan()] if name.endswith("_stderr") else value
            if not known.isfinite().all():
                raise InvalidValueError(f"{name}: expected finite values, got NaN or infinity")
            if name != "mean" and (known < 0).any():
                raise InvalidValueError(f"{name}: expected 0 or more, got {float(known.min())}")

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return self.mean.numel()

    @property
    def dead(self) -> Tensor:
        """Which channels, boolean of shape (C,), have one value in all of the data.

        A standard deviation below a millionth of the mean is the rounding of a float32 constant.
        """
        return self.var <= (1e-6 * self.mean).square()

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


def with_eps(var: Tensor, eps: float | Tensor) -> Tensor:
    """Return the square of what evaluation divides by, ``var + eps``; never 0.

    With ``eps=0`` a dead channel would be infinitely far from everything but its like.
    """
    return (var + eps).clamp(min=torch.finfo(var.dtype).tiny ** 0.5)


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
