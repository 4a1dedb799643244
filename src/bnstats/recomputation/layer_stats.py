"""The statistics of one layer: a population's, and those that the layer runs with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidValueError, NonFiniteStatisticsError
from bnstats.formatting import describe
from bnstats.moments import Moments
from bnstats.recomputation.spread import transformed

_UNSHOWN = ("mean_var_cov", "spread", "sample_spread")
_TENSORS = ("mean", "var", "mean_stderr", "var_stderr", *_UNSHOWN)


@dataclass(frozen=True, eq=False, repr=False)
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
        mean_var_cov: covariance of the errors of ``mean`` and ``var``; NaN where not known.
        spread: what errors are taken from, of shape (C, 3, 3): with n the values of a sampling
            unit (a batch), a its mean minus ``mean``, and b its mean square about ``mean`` minus
            the biased variance, the sums over the units of ``n^2 (1, a, b) (1, a, b)^T``; for an
            average of batches those without n, b the difference of the variances. NaN where not
            known.
        num_samples: how many samples the spread between them is of; 0 where it was not taken.
        sample_spread: what ``spread`` is, with samples for units: entries of the first axis of the
            layer's input, whose positions are correlated; 0 where it was not taken.
        mean_weight: weight of the loader's mean against the prior's; 1 without a prior.
        var_weight: the same of the variance's logarithm.

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
    # None is replaced by NaN, or by 0 for what is of no samples.
    mean_var_cov: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    spread: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    num_samples: int = field(default=0, kw_only=True)
    sample_spread: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    mean_weight: float = field(default=1.0, kw_only=True)
    var_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        channels = self.num_features
        shapes = dict.fromkeys(("spread", "sample_spread"), (channels, 3, 3))
        for name in ("mean_var_cov", "spread", "sample_spread"):
            if getattr(self, name) is None:
                fill = 0 if name == "sample_spread" else torch.nan
                unknown = self.mean.new_full(shapes.get(name, (channels,)), fill)
                object.__setattr__(self, name, unknown)
        for name, value in vars(self).items():
            expected = shapes.get(name, (channels,))
            if isinstance(value, Tensor) and value.shape != expected:
                raise InvalidValueError(
                    f"LayerStats: {name}: expected shape {expected}, got {tuple(value.shape)}"
                )

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if name not in _UNSHOWN}
        return describe("LayerStats", shown)

    def check_values(self) -> None:
        """Refuse impossible values: negative, complex, not finite, out of range.

        Standard errors and spreads may be NaN: a single batch does not determine them.

        Raises:
            InvalidValueError: a value is not possible; the message names it.
        """
        least_of = {"count": 1, "num_batches": 1, "correction": 0, "eps": 0, "num_samples": 0}
        for name, least in {**least_of, "mean_weight": 0, "var_weight": 0}.items():
            value = getattr(self, name)
            kinds = (int, float) if name in ("eps", "mean_weight", "var_weight") else (int,)
            if not isinstance(value, kinds) or not least <= value < math.inf:
                raise InvalidValueError(f"{name}: expected a number from {least}, got {value!r}")
        if self.correction > 1:
            raise InvalidValueError(f"correction: expected 0 or 1, got {self.correction}")
        if (most := max(self.mean_weight, self.var_weight)) > 1:
            raise InvalidValueError(f"mean_weight, var_weight: expected 1 at most, got {most}")
        for name in _TENSORS:
            value = getattr(self, name)
            if value.dtype not in (torch.float64, torch.float32):
                raise InvalidValueError(f"{name}: expected float64, got {value.dtype}")
            known = value if name in ("mean", "var") else value[~value.isnan()]
            if not known.isfinite().all():
                raise InvalidValueError(f"{name}: expected finite values, got NaN or infinity")
            if name in ("var", "mean_stderr", "var_stderr") and (known < 0).any():
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
        count = torch.tensor(self.count, device="cpu")
        return Moments(count, self.mean, self.var * (self.count - self.correction))

    @property
    def unit_covariance(self) -> Tensor:
        """Covariance of the mean and the variance of one sampling unit, of shape (C, 2, 2).

        A unit is a batch. The errors of statistics of k other units alike are a k-th of this;
        NaN where fewer than two were seen.
        """
        return of_one_unit(self.spread, self.num_batches)

    @property
    def sample_covariance(self) -> Tensor:
        """The same of one sample, of shape (C, 2, 2); NaN where their spread was not taken."""
        return of_one_unit(self.sample_spread, self.num_samples)

    def merge(self, other: LayerStats) -> LayerStats:
        """Return the pooled statistics of the values of both.

        The standard errors are those of two strata, each of which was sampled on its own: exact
        also where the two are of different data. A part with a single batch has no standard
        error of its own; then the batches of both count as one sample. NaN where a part was read
        from a file of an early version, which did not save the spread.
        """
        total = self.moments + other.moments
        count, biased = int(total.count), total.var(0)
        spread, sample_spread = self.mean.new_zeros(2, 3, 3, self.num_features)
        errors = _Errors(*torch.zeros_like(self.spread[:, 0]).unbind(1))
        for part in (self, other):
            # About the mean of all, a part's variance has a share of its mean's error.
            shift = part.mean - total.mean
            constant = part.moments.var(0) + shift.square() - biased
            about = shift, 2 * shift, constant
            spread = spread + transformed(part.spread.permute(1, 2, 0), *about)
            sample_spread = sample_spread + transformed(part.sample_spread.permute(1, 2, 0), *about)
            errors = errors.plus(part._errors().referred(shift), (part.count / count) ** 2)
        # If one part lacks them, the merged statistics do too.
        taken = self.num_samples and other.num_samples
        num_samples = self.num_samples + other.num_samples if taken else 0
        merged = replace(
            self,
            count=count,
            num_batches=self.num_batches + other.num_batches,
            mean=total.mean,
            var=total.var(self.correction),
            spread=spread.permute(2, 0, 1),
            num_samples=num_samples,
            sample_spread=sample_spread.permute(2, 0, 1),
        )
        of_mean, cov, of_var = (
            torch.where(of_strata.isnan(), of_one, of_strata)
            for of_strata, of_one in zip(errors, merged._errors_of_one_sample(), strict=True)
        )
        return replace(
            merged, mean_stderr=of_mean.sqrt(), var_stderr=of_var.sqrt(), mean_var_cov=cov
        )

    def _errors(self) -> _Errors:
        return _Errors(self.mean_stderr.square(), self.mean_var_cov, self.var_stderr.square())

    def _errors_of_one_sample(self) -> _Errors:
        """Return the errors that the spread of all units about the mean of all makes."""
        corrected = self.count / (self.count - self.correction)
        covariance = self.unit_covariance * self.spread[:, :1, :1] / self.count**2
        of_mean, cov, of_var = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
        return _Errors(of_mean, cov * corrected, of_var * corrected**2)


def of_one_unit(spread: Tensor, units: int) -> Tensor:
    """Return the covariance of the mean and the variance of one unit, from a spread of several."""
    bessel = units / (units - 1) if units > 1 else math.nan
    return bessel * spread[:, 1:, 1:] / spread[:, :1, :1]


class _Errors(NamedTuple):
    """Variances and the covariance of the errors of a mean and a variance, each of shape (C,)."""

    of_mean: Tensor
    cov: Tensor
    of_var: Tensor

    def referred(self, shift: Tensor) -> _Errors:
        """Return the errors of the mean square about a mean that is lower by the shift."""
        of_var = self.of_var + 4 * shift * (self.cov + shift * self.of_mean)
        return _Errors(self.of_mean, self.cov + 2 * shift * self.of_mean, of_var.clamp(min=0))

    def plus(self, other: _Errors, weight: float) -> _Errors:
        """Add another's, weighted."""
        return _Errors(*(x + weight * y for x, y in zip(self, other, strict=True)))


def with_eps(var: Tensor, eps: float | Tensor) -> Tensor:
    """Return the square of what evaluation divides by, ``var + eps``; never 0.

    With ``eps=0`` the distance from a dead channel would be infinite.
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

    def __repr__(self) -> str:
        return describe("RunningStats", self._asdict())

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
    """Write the statistics of all layers; if one fails, what was before is back in all.

    Raises:
        NonFiniteStatisticsError: the dtype of a layer's buffers cannot hold them.
    """
    for name, layer in layers.items():
        _check_range(name, layer, after[name])
    try:
        for name, layer in layers.items():
            RunningStats(after[name].mean, after[name].var).write_to(layer)
    except BaseException:
        for name, layer in layers.items():
            before[name].write_to(layer)
        raise


def _check_range(name: str, layer: _BatchNorm, stats: LayerStats) -> None:
    """Refuse statistics that overflow the dtype of a layer's buffers."""
    for what in ("mean", "var"):
        values: Tensor = getattr(stats, what)
        buffer: Tensor = getattr(layer, f"running_{what}")
        if values.to(buffer.dtype).isinf().any() and not values.isinf().any():
            dtype = str(buffer.dtype).removeprefix("torch.")
            raise NonFiniteStatisticsError(
                f"layer '{name}' ({type(layer).__name__}): expected a running_{what} that {dtype} "
                f"holds, up to {torch.finfo(buffer.dtype).max:g}, got "
                f"{values.abs().max().item():g}: nothing was written; make the layer float32, by "
                "model.float() or layer.float(), and run the model under autocast"
            )
