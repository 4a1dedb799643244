"""The weights of an exponential moving average."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from bnstats.accumulators.averaging import affine, separate
from bnstats.moments import Number, Weights


def exponential(
    num_batches: Number,
    momentum: float,
    batch_values: Number = 0,
    *,
    debias: bool = True,
    pooled: bool = True,
) -> Weights:
    r"""Weigh batch t by momentum; t counts it and the ``num_batches`` before it.

    Debiased, its weight is ``momentum / (1 - q^t)`` with ``q = 1 - momentum``: the first batch has
    weight 1, and the initial state no part in what follows (the bias correction of Adam, Kingma
    and Ba 2015, section 3, in recursive form). The sum Q of squared shares
    (:mod:`bnstats.accumulators.averaging`) needs no state: n of this batch stands for the sizes
    of those before it, and ::

        Q' = momentum / (2 - momentum) (1 + q^t) / (1 - q^t) / n         debiased
        Q' = momentum / (2 - momentum) (1 - q^(2 t)) / n                 not debiased

    Args:
        num_batches: batches before this one.
        momentum: weight of the new batch in the limit, in [0, 1]; 0 leaves the state alone.
        batch_values: n, values per channel in this batch; pooled, at least 2.
        debias: take the initial state out.
        pooled: count the variance between the state's mean and the batch's.
    """
    on_device = isinstance(num_batches, Tensor) or isinstance(batch_values, Tensor)
    if on_device or torch.compiler.is_compiling():
        return _weights(num_batches, momentum, batch_values, debias, pooled)
    # In a long training the weights are always the same.
    settled = 40 / max(momentum, 1e-30)
    return _cached(min(num_batches, settled), momentum, batch_values, debias, pooled)


def _weights(
    num_batches: Number, momentum: float, batch_values: Number, debias: bool, pooled: bool
) -> Weights:
    q = 1 - momentum
    if momentum == 0:
        return separate(math.inf)
    if not debias and not pooled:
        return separate(1 / momentum)
    if debias:
        # 1 for the first batch, to the bit.
        size = affine(1, -q / momentum, _decay(num_batches, momentum))
        if not pooled:
            return separate(size)
    unit = 1 - 1 / batch_values
    limit = momentum / (2 - momentum) / batch_values  # of Q
    if debias:
        divisor = affine(-2 * limit / momentum / unit, (1 + limit) / unit, size)
        return Weights(size, divisor, fade=(1 - limit) / unit, between=1 / unit)
    decay = _decay(2 * num_batches, momentum)  # q^(2 (t - 1)) - 1
    before, after = limit * (1 - q**2), limit * q**2  # Q' = before - after decay
    divisor = affine((1 - before) / momentum / unit, after / momentum / unit, decay)
    fade = affine((1 - momentum / batch_values) / unit, -q * limit / unit, decay)
    return Weights(1 / momentum, divisor, fade, between=1 / unit)


_cached = lru_cache(maxsize=4096)(_weights)


def _decay(num_batches: Number, momentum: float) -> Number:
    """Return ``(1 - momentum)^num_batches - 1`` without its cancellation for a small momentum."""
    # Not the logarithm of 0: times no batches it would be NaN.
    rate = math.log1p(-momentum) if momentum < 1 else -1e30
    if isinstance(num_batches, Tensor):
        return torch.mul(num_batches, rate).expm1_()
    return math.expm1(rate * num_batches)
