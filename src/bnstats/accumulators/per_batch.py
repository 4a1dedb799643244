"""The weights of the plain average over batches."""

from __future__ import annotations

from bnstats.accumulators.exponential import averaging
from bnstats.moments import Number, Weights


def per_batch(num_batches: Number, *, pooled: bool = False) -> Weights:
    """Weigh batch ``num_batches`` (counted from 1) by ``1 / num_batches``, whatever its size.

    With ``pooled=False`` it is Algorithm 2 of Ioffe and Szegedy (2015): the average of the
    batches' means and of their unbiased variances.
    """
    return averaging(1 / num_batches, pooled=pooled)
