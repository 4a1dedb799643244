"""Moments of each sample of a batch: entries of its first axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnstats.reduction import (
    FEWEST_FAST,
    accumulator,
    cancelling_channels,
    short_rows,
    sums_of_rows,
    wide_dtype,
)


def moments_of_samples(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations of each sample and channel, both of shape (N, C).

    In one pass over x, of shape (N, C, ...), on CPU by sums of rows.
    """
    wide = wide_dtype(x.device)
    count = math.prod(x.shape[2:])
    if count == 1 or x.numel() == 0:
        mean = x.flatten(1).to(wide) if count == 1 else x.new_zeros(x.shape[:2], dtype=wide)
        return mean, torch.zeros_like(mean)
    if x.device.type == "cpu" and (x.numel() < FEWEST_FAST or not x.is_floating_point()):
        return _exactly(x)
    rows = short_rows(x)
    if x.device.type != "cpu" or rows is None:
        axes = list(range(2, x.dim()))
        x = x.to(accumulator(x) if x.is_floating_point() else wide)
        var, mean = torch.var_mean(x, axes, correction=0)
        return mean.to(wide), var.to(wide).mul_(count)
    total, squares = map(_per_sample, sums_of_rows(rows))
    mean = total / count
    m2 = torch.addcmul(squares, total, mean, value=-1).clamp_(min=0)
    cancelling = cancelling_channels(squares.sum(0), m2.sum(0))
    if cancelling is not None:
        channels = cancelling.nonzero().squeeze(1)
        exact_mean, exact_m2 = _exactly(x.index_select(1, channels))
        mean.index_copy_(1, channels, exact_mean)
        m2.index_copy_(1, channels, exact_m2)
    return mean, m2


def _exactly(x: Tensor) -> tuple[Tensor, Tensor]:
    """Take two passes in float64."""
    values = x.flatten(2).double()
    mean = values.mean(2)
    return mean, (values - mean[:, :, None]).square_().sum(2)


def masked_moments_of_samples(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sample's number of valid values (N, 1), mean and squared deviations (N, C)."""
    wide, axes = wide_dtype(x.device), list(range(2, x.dim()))
    x = x.to(accumulator(x))
    count = mask.expand(x.shape[0], 1, *x.shape[2:]).flatten(1).sum(1, keepdim=True).to(wide)

    def total(values: Tensor) -> Tensor:
        return values.to(wide) if not axes else values.sum(axes, dtype=wide)

    mean = total(torch.where(mask, x, 0)) / count.clamp(min=1)
    about = mean.to(x.dtype).view(*mean.shape, *[1] * len(axes))
    return count, mean, total(torch.where(mask, x - about, 0).square())


def _per_sample(of_rows: Tensor) -> Tensor:
    """Add up what rows gave, of shape (N, C) or (N, C, rows), per sample, in float64."""
    return of_rows.double() if of_rows.dim() == 2 else of_rows.sum(2, dtype=torch.float64)
