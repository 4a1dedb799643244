"""Mean and sum of squared deviations of the valid values of one batch, per channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnstats.private import on_host
from bnstats.reduction import (
    FEWEST_FAST,
    accumulator,
    along_channels,
    cancelling_channels,
    other_axes,
    per_channel,
    short_rows,
    sums_of_squares,
    wide_dtype,
)


def masked_mean_and_m2(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return number, mean and sum of squared deviations of the valid values per channel.

    Padding of any amount and value changes nothing. On CPU, fewer than 2^16 values are added up
    in float64, and sums of more that cancel are taken again, about the mean.

    Args:
        x: of shape (N, C, ...).
        mask: boolean, broadcastable to x, the channel axis being 1.
    """
    count = count_positions(mask, x)
    divisor = count.clamp(min=1)
    wide = wide_dtype(x.device)
    x = x.to(wide if x.is_cpu and x.numel() < FEWEST_FAST else accumulator(x))
    about, deviations = None, None
    if on_host(x) and x.dim() > 2 and x.numel():
        # Products take a fifth of the time of torch.where; padding that is not finite spoils them.
        factor = mask.expand(x.shape[0], 1, *x.shape[2:]).to(x.dtype)
        mean, squares, m2 = _moments_of(x * factor, divisor)
        if math.isfinite(m2.sum()):
            if cancelling_channels(squares, m2) is None:
                return count, mean, m2.clamp_(min=0)
            about = mean.to(x.dtype)
            deviations = (x - along_channels(about, x)).mul_(factor)
    if about is None or deviations is None:
        about = (_sum(torch.where(mask, x, 0)) / divisor).to(x.dtype)
        deviations = torch.where(mask, x - along_channels(about, x), 0)
    mean, _, m2 = _moments_of(deviations, divisor)  # the mean is what rounding has left
    return count, mean + about.to(wide), m2.clamp(min=0)


def count_positions(mask: Tensor, x: Tensor) -> Tensor:
    """Return the number of valid positions, int64 of shape ()."""
    return mask.expand(x.shape[0], 1, *x.shape[2:]).sum()


def _moments_of(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, sum of squares and sum of squared deviations of values, all others being 0."""
    total, squares = _sum(x), _sum_of_squares(x)
    mean = total / count
    return mean, squares, torch.addcmul(squares, total, mean, value=-1)


def _sum(x: Tensor) -> Tensor:
    rows = short_rows(x) if x.is_cpu else None
    if rows is None:
        return x.sum(other_axes(x), dtype=wide_dtype(x.device))
    return per_channel(rows.sum(-1))


def _sum_of_squares(x: Tensor) -> Tensor:
    rows = short_rows(x) if x.is_cpu else None
    if rows is None:
        return x.to(wide_dtype(x.device)).square().sum(other_axes(x))
    return sums_of_squares(rows)
