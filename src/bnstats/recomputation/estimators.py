"""From the moments of batches to population statistics and their standard errors.

An estimator works channel by channel, so that one serves a single layer or, laid end to end, a
whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bnstats.accumulators import exponential, per_batch
from bnstats.moments import Moments, Number, Weights, fold, merge_all
from bnstats.recomputation.spread import STATE_ROWS, Spread, merged_states, state_of_units

EMA_MOMENTUM = 0.1
"""Momentum of ``method="ema"``: torch's default for its layers."""


class Estimate(NamedTuple):
    """Population statistics per channel, each of shape (C,); the spreads (C, 3, 3).

    The fields are described in :class:`bnstats.LayerStats`.
    """

    num_values: Tensor
    num_batches: Tensor
    mean: Tensor
    var: Tensor
    mean_stderr: Tensor
    var_stderr: Tensor
    mean_var_cov: Tensor
    spread: Tensor
    num_samples: Tensor
    sample_spread: Tensor
    mean_weight: Tensor
    var_weight: Tensor


class Estimator(Protocol):
    """Takes the moments of batches one by one, their counts of shape (C,).

    A channel whose count is 0 in a batch does not see that batch.
    """

    def add(self, batch: Moments, samples: Tensor | None = None) -> None:
        """Take the moments of one more batch, and the spread between its samples."""

    def estimate(self, fraction: float = 0) -> Estimate:
        """Return the current estimate; standard errors are NaN before the second batch.

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
        samples: each batch comes with the spread between its samples.
    """

    def __init__(self, correction: Tensor, like: Tensor, *, samples: bool = False) -> None:
        self._correction = correction
        self._total = Moments(*like.new_zeros(3, *like.shape))
        self._spread = Spread(like, about_reference=True)
        self._samples = Spread(like, about_reference=True) if samples else None

    def add(self, batch: Moments, samples: Tensor | None = None) -> None:
        """Merge the batch in, by its number of values."""
        if self._samples is not None and samples is not None:
            self._samples.merge_state(samples)
        self._total = self._total + batch
        offset = self._spread.offset(batch)
        # The batch's mean square about the reference; about the pooled mean it is a linear form.
        mean_square = (batch.m2 / batch.count.clamp(min=1)).addcmul_(offset, offset)
        self._spread.add(offset, mean_square, batch.count.square())

    def state(self) -> Tensor:
        """Return the pooled moments, the spread and that between samples if taken, (rows, C)."""
        total = [self._total.count, self._total.mean, self._total.m2]
        samples = [] if self._samples is None else [self._samples.state()]
        return torch.cat([torch.stack(total), self._spread.state(), *samples])

    def merge_state(self, state: Tensor) -> None:
        """Merge another one's moments in, by their number of values."""
        self._total = self._total + Moments(*state[:3])
        self._spread.merge_state(state[3 : 3 + STATE_ROWS])
        if self._samples is not None:
            self._samples.merge_state(state[3 + STATE_ROWS :])

    def estimate(self, fraction: float = 0) -> Estimate:
        """Return the pooled statistics."""
        count, mean = self._total.count, self._total.mean
        var, biased = self._total.var(self._correction), self._total.var(0)
        spread = self._spread.about(mean, biased)
        scale = (1 - fraction) * self._spread.bessel() / count.square()
        corrected = count / (count - self._correction)
        of_samples = torch.zeros_like(spread)
        if self._samples is not None:
            of_samples = self._samples.about(mean, biased)
        return Estimate(
            num_values=count,
            num_batches=self._spread.num_units,
            mean=mean,
            var=var,
            mean_stderr=(scale * spread[1, 1]).clamp(min=0).sqrt(),
            var_stderr=(scale * spread[2, 2]).clamp(min=0).sqrt() * corrected,
            mean_var_cov=scale * spread[1, 2] * corrected,
            spread=spread.permute(2, 0, 1),
            num_samples=torch.zeros_like(mean)
            if self._samples is None
            else self._samples.num_units,
            sample_spread=of_samples.permute(2, 0, 1),
            mean_weight=torch.ones_like(mean),
            var_weight=torch.ones_like(mean),
        )


def pooled_state(
    counts: Tensor, means: Tensor, m2s: Tensor, samples: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the ``state()`` of a :class:`Pooled` that was given these batches.

    Args:
        counts: number of values per channel, of shape (B, 1).
        means: of shape (B, C).
        m2s: of shape (B, C).
        samples: the state of the spread between the samples of each batch, where it is taken.
    """
    count, mean, m2 = merge_all(counts.squeeze(1), means, m2s)
    total = torch.stack([count.expand_as(mean), mean, m2])
    of_samples = [] if samples is None else [merged_states(samples)]
    return torch.cat([total, state_of_units(means, m2s, counts, mean), *of_samples])


class Averaged:
    """An average of the batches' means and variances that ignores their sizes.

    A batch without a variance (one value, with a correction of 1) counts for the mean only. The
    standard errors are the spread between batches times the root of the sum of the squared
    weights.

    Args:
        correction: of shape (C,), subtracted from the count in each batch variance's divisor.
        like: any float tensor of shape (C,), for its shape, dtype and device.
        policy: from the number of batches before a new one to its weights.
    """

    def __init__(
        self, correction: Tensor, like: Tensor, policy: Callable[[Tensor], Weights]
    ) -> None:
        self._correction = correction
        self._policy = policy
        self._count, self._mean, self._var = like.new_zeros(3, *like.shape)
        self._mean_squares, self._var_squares = like.new_zeros(2, *like.shape)  # of the weights
        self._of_means = Spread(like, about_reference=False)
        self._of_vars = Spread(like, about_reference=False)  # of the batches that have one

    def add(self, batch: Moments, samples: Tensor | None = None) -> None:  # noqa: ARG002
        """Average the batch in; its samples do not count, as their spread is about other means."""
        with_mean, with_var = batch.count > 0, batch.count > self._correction
        var = torch.where(with_var, batch.var(self._correction), 0)
        for_mean = self._policy(self._of_means.num_units).size
        for_var = self._policy(self._of_vars.num_units).size
        self._fold(batch.mean, var, for_mean, for_var, with_mean, with_var)
        self._count = self._count + batch.count
        offset = self._of_means.offset(batch)
        self._of_vars.reference = self._of_means.reference
        self._of_means.add(offset, torch.zeros_like(var), with_mean.to(var.dtype))
        self._of_vars.add(offset, var, with_var.to(var.dtype))

    def state(self) -> Tensor:
        """Return the averages and the spreads, (21, C)."""
        averages = [self._count, self._mean, self._var, self._mean_squares, self._var_squares]
        return torch.cat([torch.stack(averages), self._of_means.state(), self._of_vars.state()])

    def merge_state(self, state: Tensor) -> None:
        """Average another one's averages in, each by its number of batches.

        For equal weights this is the average over all batches. A moving average cannot be
        merged so: it merges into an empty state only.
        """
        count, mean, var, mean_squares, var_squares = state[:5]
        of_means, of_vars = state[5:].chunk(2)
        with_mean, with_var = of_means[0] > 0, of_vars[0] > 0
        for_mean, for_var = (
            (mine.num_units + theirs[0]) / theirs[0]
            for mine, theirs in ((self._of_means, of_means), (self._of_vars, of_vars))
        )
        self._fold(mean, var, for_mean, for_var, with_mean, with_var, mean_squares, var_squares)
        self._count = self._count + count
        self._of_means.merge_state(of_means)
        self._of_vars.merge_state(of_vars)

    def _fold(
        self,
        mean: Tensor,
        var: Tensor,
        for_mean: Number,
        for_var: Number,
        with_mean: Tensor,
        with_var: Tensor,
        mean_squares: Number = 1.0,
        var_squares: Number = 1.0,
    ) -> None:
        """Add a mean and a variance, each with its own size, where it exists."""
        new_mean, new_var = fold(self._mean, self._var, mean, var, Weights(for_mean, for_var))
        self._mean = torch.where(with_mean, new_mean, self._mean)
        self._var = torch.where(with_var, new_var, self._var)
        squares = (1 - 1 / for_mean) ** 2 * self._mean_squares + mean_squares / for_mean**2
        self._mean_squares = torch.where(with_mean, squares, self._mean_squares)
        squares = (1 - 1 / for_var) ** 2 * self._var_squares + var_squares / for_var**2
        self._var_squares = torch.where(with_var, squares, self._var_squares)

    def estimate(self, fraction: float = 0) -> Estimate:
        """Return the averages; the variance is NaN where no batch has one."""
        # The spread is taken about the plain averages; the policy's may be off them.
        mean = self._of_means.reference + self._of_means.average()[0]
        var = self._of_vars.average()[1]
        spread = self._of_means.about(mean, torch.zeros_like(mean))
        of_vars = self._of_vars.about(mean, var)
        spread[2], spread[:, 2] = of_vars[2], of_vars[:, 2]
        of_mean = self._scale(self._of_means, self._mean_squares, fraction)
        of_var = self._scale(self._of_vars, self._var_squares, fraction)
        return Estimate(
            num_values=self._count,
            num_batches=self._of_means.num_units,
            mean=self._mean,
            var=torch.where(self._of_vars.num_units > 0, self._var, torch.nan),
            mean_stderr=(of_mean * spread[1, 1]).clamp(min=0).sqrt(),
            var_stderr=(of_var * spread[2, 2]).clamp(min=0).sqrt(),
            mean_var_cov=of_mean * spread[1, 2],
            spread=spread.permute(2, 0, 1),
            num_samples=torch.zeros_like(mean),
            sample_spread=torch.zeros_like(spread).permute(2, 0, 1),
            mean_weight=torch.ones_like(mean),
            var_weight=torch.ones_like(mean),
        )

    @staticmethod
    def _scale(spread: Spread, squares: Tensor, fraction: float) -> Tensor:
        """Return what makes a sum of squares the squared error of the average."""
        squares = (squares - fraction / spread.num_units).clamp(min=0)
        return spread.bessel() / spread.num_units * squares


def averaged(correction: Tensor, like: Tensor) -> Averaged:
    """Return the estimator of ``"batch_average"``."""
    return Averaged(correction, like, per_batch)


def moving_average(correction: Tensor, like: Tensor) -> Averaged:
    """Return the estimator of ``"ema"``."""

    def policy(num_batches: Tensor) -> Weights:
        return exponential(num_batches, EMA_MOMENTUM, pooled=False)

    return Averaged(correction, like, policy)
