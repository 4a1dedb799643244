r"""What all weights have in common, and those of two plain averages.

A batch of n values has the weight a in the mean. Let Q be the sum over all batches before it of
(share of the batch)^2 / (its number of values): the mean of values of one variance v has itself
the variance Q v, which a variance about it lacks. The unbiased recursion, pooled over batches::

    Q'   = (1 - a)^2 Q + a^2 / n
    mean <- mean + a d
    var  <- [ (1 - a) (1 - Q) var + a (n - 1)/n s + a (1 - a) d^2 ] / (1 - Q')

for the batch's unbiased variance s. For values of one distribution its expectation is their
variance, for batches of any size and number. A policy is an a and a Q.
In terms of :class:`~bnstats.moments.Weights` the second line reads, with ``u = (n - 1)/n``::

    size = 1 / a;  divisor = (1 - Q') / (a u);  fade = (1 + (1 - a) Q - a / n) / u;  between = 1 / u
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnstats.moments import Number, Weights


def separate(size: Number) -> Weights:
    """Return the weights of two averages, of the means and of the variances: nothing pooled."""
    return Weights(size, size)


def affine(constant: Number, slope: Number, x: Number) -> Number:
    """Return ``constant + slope x``, of a floating-point tensor in one operation."""
    if isinstance(x, Tensor) and not (isinstance(constant, Tensor) or isinstance(slope, Tensor)):
        # torch does not subtract a multiple by a symbolic number, which a traced size gives.
        if not x.is_floating_point() or isinstance(slope, torch.SymFloat):
            x, slope = x * slope, 1.0
        return torch.rsub(x, constant, alpha=-slope)
    return constant + slope * x
