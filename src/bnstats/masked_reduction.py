"""Mean and sum of squared deviations of the valid values of one batch, per channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnstats.private import on_host
from bnstats.reduction import (
    accumulator,
    other_axes,
    per_channel,
    short_rows,
    sums_of_squares,
    wide_dtype,
)


def masked_mean_and_m2(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return number, mean and sum of squared deviations of the valid values per channel.

    Two passes, the second about the mean: padding of any amount and value changes nothing.

    Args:
        x: of shape (N, C, ...).
        mask: boolean, broadcastable to x, the channel axis being 1.
    """
    count = count_positions(mask, x)
    divisor = count.clamp(min=1)
    x, wide = x.to(accumulator(x)), wide_dtype(x.device)
    about, deviations = _deviations(x, mask, divisor)
    mean = _sum(deviations) / divisor  # of what rounding has left
    m2 = _sum_of_squares(deviations) - count * mean.square()
    return count, mean + about.to(wide), m2.clamp(min=0)


def count_positions(mask: Tensor, x: Tensor) -> Tensor:
    """Return the number of valid positions, int64 of shape ()."""
    return mask.expand(x.shape[0], 1, *x.shape[2:]).sum()


def _deviations(x: Tensor, mask: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean in x's precision, and the valid values' deviations from it, else 0."""
    shape = [-1, *[1] * (x.dim() - 2)]
    if on_host(x) and x.dim() > 2 and x.numel():
        # Products take a fifth of the time of torch.where; padding that is not finite spoils them.
        factor = mask.expand(x.shape[0], 1, *x.shape[2:]).to(x.dtype)
        # Under autocast, which leaves ``out=`` alone, the product would be half's.
        totals = x.new_empty(*x.shape[:2], 1)
        torch.bmm(x.flatten(2), factor.flatten(2).transpose(1, 2), out=totals)
        about = (per_channel(totals.squeeze(2)) / divisor).to(x.dtype)
        if math.isfinite(about.sum()):
            return about, (x - about.view(shape)).mul_(factor)
    about = (_sum(torch.where(mask, x, 0)) / divisor).to(x.dtype)
    return about, torch.where(mask, x - about.view(shape), 0)


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
