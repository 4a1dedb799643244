"""The weights of the mean and the unbiased variance of all values so far."""

from __future__ import annotations

from torch import Tensor

from bnstats.moments import Number, Weights


def cumulative(num_values: Number, batch_values: int) -> Weights:
    """Weigh a batch by its number of values, for a state that holds an unbiased variance.

    The sums of squares are ``(num_values - 1) var`` and ``(batch_values - 1) batch_var``;
    Chan's merge of them, divided by ``total - 1``, gives these weights.

    Args:
        num_values: values per channel before this batch; 0 where there is no state yet.
        batch_values: values per channel in this batch, at least 2.
    """
    total = num_values + batch_values
    # An empty state has no part: its weight is 0, not -1.
    before = num_values - 1
    before = before.clamp(min=0) if isinstance(before, Tensor) else max(before, 0)
    return Weights(
        step=batch_values / total,
        keep=before / (total - 1),
        gain=(batch_values - 1) / (total - 1),
        between=num_values / total * (batch_values / (total - 1)),
    )
