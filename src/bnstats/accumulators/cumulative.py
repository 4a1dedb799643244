"""The weights of the mean and the unbiased variance of all values so far."""

from __future__ import annotations

from bnstats.accumulators.averaging import affine
from bnstats.moments import Number, Weights


def cumulative(num_values: Number, batch_values: Number) -> Weights:
    """Weigh a batch by its number of values: Chan's exact merge, ``Q = 1 / num_values``.

    Args:
        num_values: values per channel before this batch.
        batch_values: n, values per channel in this batch, at least 2.
    """
    unit = 1 - 1 / batch_values
    return Weights(
        size=affine(1, 1 / batch_values, num_values),
        divisor=affine(1, 1 / (batch_values - 1), num_values),
        fade=1 / unit,
        between=1 / unit,
    )
