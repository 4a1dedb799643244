"""The weights of an exponential moving average."""

from __future__ import annotations

import math

from torch import Tensor

from bnstats.moments import Number, Weights


def exponential(
    num_batches: Number, momentum: float, *, debias: bool = True, pooled: bool = True
) -> Weights:
    """Weigh batch ``num_batches`` (counted from 1) by momentum.

    Debiased, the weight is ``momentum / (1 - (1 - momentum)^t)``: the first batch has weight 1,
    and the initial state no part in what follows (the bias correction of Adam, Kingma and Ba
    2015, section 3, in recursive form).

    Args:
        num_batches: batches so far, this one included.
        momentum: weight of the new batch in the limit, in [0, 1]; 0 leaves the state alone.
        debias: take the initial state out.
        pooled: count the variance between the state's mean and the batch's.
    """
    weight: Number = momentum
    if debias and 0 < momentum < 1:
        # 1 - (1 - momentum)^t, without its cancellation for a small momentum.
        exponent = math.log1p(-momentum) * num_batches
        seen = exponent.expm1() if isinstance(exponent, Tensor) else math.expm1(exponent)
        weight = -momentum / seen
    return averaging(weight, pooled=pooled)


def averaging(weight: Number, *, pooled: bool) -> Weights:
    """Weigh a batch by ``weight`` and what was before by the rest."""
    keep = 1 - weight
    return Weights(step=weight, keep=keep, gain=weight, between=weight * keep if pooled else 0)
