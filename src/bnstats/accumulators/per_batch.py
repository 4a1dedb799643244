"""The weights of the plain average over batches."""

from __future__ import annotations

from bnstats.accumulators.averaging import affine, separate
from bnstats.moments import Number, Weights


def per_batch(num_batches: Number, batch_values: Number = 0, *, pooled: bool = False) -> Weights:
    """Weigh a batch of any size by 1 / t; t counts it and the ``num_batches`` before it.

    With ``pooled=False`` it is Algorithm 2 of Ioffe and Szegedy (2015): the average of the
    batches' means and of their unbiased variances. Pooled, n of this batch stands for the sizes
    of those before it: ``Q = 1 / ((t - 1) n)``.

    Args:
        num_batches: batches before this one.
        batch_values: n, values per channel in this batch; pooled, at least 2.
        pooled: count the variance between batch means too.
    """
    size = num_batches + 1
    if not pooled:
        return separate(size)
    unit = 1 - 1 / batch_values
    divisor = affine(1, 1 / unit, num_batches)
    return Weights(size, divisor, fade=1 / unit, between=1 / unit)
