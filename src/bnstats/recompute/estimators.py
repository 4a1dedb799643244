"""From the moments of batches to population statistics and their standard errors.

An estimator works channel by channel, so that one serves a single layer or, laid end to end, a
whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bnstats.accumulators import exponential, per_batch
from bnstats.accumulators.exponential import averaging
from bnstats.moments import Moments, Weights, fold
from bnstats.recompute.spread import Spread

EMA_MOMENTUM = 0.1
"""Momentum of ``method="ema"``: torch's default for its layers."""


class Estimate(NamedTuple):
    """Population statistics per channel, each of shape (C,); the spread (C, 3, 3).

    What they say is in :class:`bnstats.LayerStats`.
    """

    num_values: Tensor
    num_batches: Tensor
    mean: Tensor
    var: Tensor
    mean_stderr: Tensor
    var_stderr: Tensor
    mean_var_cov: Tensor
    spread: Tensor


class Estimator(Protocol):
    """Takes the moments of batches one by one, their counts of shape (C,).

    A channel whose count is 0 in a batch does not see that batch.

    Attributes:
        averages_variances: each batch's own variance is used, so that every batch needs more
            values than the correction.
    """

    averages_variances: bool

    def add(self, batch: Moments) -> None:
        """Take the moments of one more batch."""

    def estimate(self, fraction: float = 0) -> Estimate:
        """Return what is known so far; a standard error needs two batches, else it is NaN.

        Args:
            fraction: which part of a finite population's batches was taken (the finite
                population correction); 0 for a sample from something larger.
        """

    def state(self) -> Tensor:
        """Return all that was taken so far as one tensor of shape (rows, C)."""

    def merge_state(self, state: Tensor) -> None:
        """Merge in what another estimator of the same kind was given, from its ``state()``."""


class Pooled:
    """Exact mean and variance of all values.

    The standard errors are those of a ratio estimator whose sampling units are the batches
    (Cochran 1977, "Sampling Techniques", section 6.3), each weighing by its number of values.

    Args:
        correction: of shape (C,), subtracted from the count in the variance's divisor.
        like: any float tensor of shape (C,), for its shape, dtype and device.
    """

    averages_variances = False

    def __init__(self, correction: Tensor, like: Tensor) -> None:
        self._correction = correction
        self._total = Moments(*like.new_zeros(3, *like.shape))
        self._spread = Spread(like, about_reference=True)

    def add(self, batch: Moments) -> None:
        """Merge the batch in, by its number of values."""
        self._total = self._total + batch
        offset = self._spread.offset(batch)
        # The batch's mean square about the reference; about the pooled mean it is a linear form.
        mean_square = (batch.m2 / batch.count.clamp(min=1)).addcmul_(offset, offset)
        self._spread.add(offset, mean_square, batch.count.square())

    def state(self) -> Tensor:
        """Return the pooled moments and the spread, (11, C)."""
        total = [self._total.count, self._total.mean, self._total.m2]
        return torch.cat([torch.stack(total), self._spread.state()])

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """Return the pooled statistics without their errors, which cost more."""
        return self._total.mean, self._total.var(self._correction)

    def merge_state(self, state: Tensor) -> None:
        """Merge another one's moments in, by their number of values."""
        self._total = self._total + Moments(*state[:3])
        self._spread.merge_state(state[3:])

    def estimate(self, fraction: float = 0) -> Estimate:
        """Return the pooled statistics."""
        count, mean = self._total.count, self._total.mean
        var, biased = self._total.var(self._correction), self._total.var(0)
        spread = self._spread.about(mean, biased)
        scale = (1 - fraction) * self._spread.bessel() / count.square()
        corrected = count / (count - self._correction)
        return Estimate(
            num_values=count,
            num_batches=self._spread.num_batches,
            mean=mean,
            var=var,
            mean_stderr=(scale * spread[1, 1]).clamp(min=0).sqrt(),
            var_stderr=(scale * spread[2, 2]).clamp(min=0).sqrt() * corrected,
            mean_var_cov=scale * spread[1, 2] * corrected,
            spread=spread.permute(2, 0, 1),
        )


class Averaged:
    """An average of the batches' means and variances, whatever their sizes.

    The standard errors are the spread between batches times the root of the sum of the
    squared weights.

    Args:
        correction: of shape (C,), subtracted from the count in each batch variance's divisor.
        like: any float tensor of shape (C,), for its shape, dtype and device.
        policy: from the number of batches, the new one included, to its weights.
    """

    averages_variances = True

    def __init__(
        self, correction: Tensor, like: Tensor, policy: Callable[[Tensor], Weights]
    ) -> None:
        self._correction = correction
        self._policy = policy
        self._count, self._mean, self._var, self._squared_weights = like.new_zeros(4, *like.shape)
        self._spread = Spread(like, about_reference=False)

    def add(self, batch: Moments) -> None:
        """Average the batch in."""
        present = batch.count > 0
        var = torch.where(present, batch.var(self._correction), 0)
        weights = self._policy(self._spread.num_batches + 1)
        mean, new_var = fold(self._mean, self._var, batch.mean, var, weights)
        squares = weights.keep**2 * self._squared_weights + weights.gain**2
        self._mean = torch.where(present, mean, self._mean)
        self._var = torch.where(present, new_var, self._var)
        self._squared_weights = torch.where(present, squares, self._squared_weights)
        self._count = self._count + batch.count
        self._spread.add(self._spread.offset(batch), var, present.to(var.dtype))

    def state(self) -> Tensor:
        """Return the averages and the spread, (12, C)."""
        averages = [self._count, self._mean, self._var, self._squared_weights]
        return torch.cat([torch.stack(averages), self._spread.state()])

    def merge_state(self, state: Tensor) -> None:
        """Average another one's averages in, each by its number of batches.

        Of averages with equal weights that is the average over all batches. A moving average
        knows no such merge, and merges into an empty state alone.
        """
        count, mean, var, squared_weights = state[:4]
        batches = self._spread.num_batches + state[4]
        weights = averaging(state[4] / batches.clamp(min=1), pooled=False)
        self._mean, self._var = fold(self._mean, self._var, mean, var, weights)
        squares = weights.keep**2 * self._squared_weights + weights.gain**2 * squared_weights
        self._squared_weights = squares
        self._count = self._count + count
        self._spread.merge_state(state[4:])

    def estimate(self, fraction: float = 0) -> Estimate:
        """Return the averages."""
        batches = self._spread.num_batches
        # The spread is taken about the plain average; the policy's average may be off it.
        offset, var = self._spread.matrix[0, 1:] / batches
        spread = self._spread.about(self._spread.reference + offset, var)
        squared_weights = (self._squared_weights - fraction / batches).clamp(min=0)
        scale = self._spread.bessel() / batches * squared_weights
        return Estimate(
            num_values=self._count,
            num_batches=batches,
            mean=self._mean,
            var=self._var,
            mean_stderr=(scale * spread[1, 1]).clamp(min=0).sqrt(),
            var_stderr=(scale * spread[2, 2]).clamp(min=0).sqrt(),
            mean_var_cov=scale * spread[1, 2],
            spread=spread.permute(2, 0, 1),
        )


def averaged(correction: Tensor, like: Tensor) -> Averaged:
    """Return the estimator of ``"batch_average"``."""
    return Averaged(correction, like, per_batch)


def moving_average(correction: Tensor, like: Tensor) -> Averaged:
    """Return the estimator of ``"ema"``."""

    def policy(num_batches: Tensor) -> Weights:
        return exponential(num_batches, EMA_MOMENTUM, debias=True, pooled=False)

    return Averaged(correction, like, policy)
