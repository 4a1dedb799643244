"""Mean and sum of squared deviations of one batch, per channel: fast, and without cancellation.

On CPU torch's own variance kernels are far from the limit that memory sets. Row sums and row
norms read x at that limit; combined in float64 they give the variance, as long as it is not
small against the squared mean. Channels where it is small are computed again, centered, in
float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LONGEST_ROW = 1024
"""Values that one float32 accumulator may add up: a longer row loses digits (see tests)."""

_LARGEST_SQUARED_MEAN = 8.0
"""Squared mean over variance above which the fast sums are not trusted: they have a relative
error of some 2e-7, which the subtraction magnifies by this ratio plus one."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def mean_and_m2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations per channel, for x of shape (N, C, ...)."""
    wide = wide_dtype(x.device)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=wide, device=x.device)
        return zeros, zeros
    if x.device.type == "cpu" and x.dim() > 2 and x.is_floating_point():
        return _from_rows(x)
    if x.device.type == "cpu" or not x.is_floating_point():
        return _centered(x.to(wide))
    # Elsewhere var_mean is Welford's algorithm in one launch.
    x = x if x.dtype == torch.float64 else x.float()
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0)
    return mean.to(wide), var.to(wide) * (x.numel() // x.shape[1])


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of the squares per channel, for x of shape (N, C, ...) with values.

    In the wide dtype on CPU, elsewhere in float32 or x's own precision if that is higher.
    """
    count = x.numel() // x.shape[1]
    if x.device.type != "cpu":
        axes = [axis for axis in range(x.dim()) if axis != 1]
        norm: Tensor = torch.linalg.vector_norm(x, dim=axes, dtype=_accumulator(x))
        return norm.square_().div_(count)
    squares = _sums_of_squares(_short_rows(x)) if x.dim() > 2 else x.double().square().sum(0)
    return squares.div_(count)


def _centered(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two passes: the mean, then the squares about it, corrected for the mean's rounding."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    count = x.numel() // x.shape[1]
    mean = x.mean(axes)
    deviation = x - mean.view(shape)
    rounding = deviation.mean(axes)
    m2 = deviation.square_().sum(axes) - count * rounding.square()
    return mean + rounding, m2.clamp_(min=0)


def _from_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Add up rows and their squares in x's precision, the rows' results in float64."""
    count = x.numel() // x.shape[1]
    rows = _short_rows(x)
    total = rows.sum(-1, dtype=_accumulator(x)).sum((0, 2), dtype=torch.float64)
    squares = _sums_of_squares(rows)
    mean = total / count
    squared_mean = total * mean
    m2 = squares - squared_mean

    # NaN compares as not suspicious: it stays what it is.
    suspicious = squared_mean > _LARGEST_SQUARED_MEAN * m2
    if suspicious.any():
        channels = suspicious.nonzero().squeeze(1)
        mean[channels], m2[channels] = _centered(x.index_select(1, channels).double())
    return mean, m2


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums_of_squares(rows: Tensor) -> Tensor:
    """Add up the squares of rows, (N, C, rows, length), per channel; return float64."""
    if rows.stride(-1) == 1:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=_accumulator(rows))
        return norms.square_().sum((0, 2), dtype=torch.float64)
    # channels_last: a norm over a strided axis is slow
    return rows.to(_accumulator(rows)).square().sum(-1).sum((0, 2), dtype=torch.float64)


def _short_rows(x: Tensor) -> Tensor:
    """View x of shape (N, C, ...) as rows, (N, C, rows, length), of at most the longest length."""
    length = math.prod(x.shape[2:])
    fewest = -(-length // _LONGEST_ROW)
    # A length without a fitting divisor, a large prime say, stays whole.
    # (Not by next with a default: torch 2.6 cannot compile that.)
    fitting = [n for n in range(fewest, 4 * fewest) if length % n == 0]
    parts = fitting[0] if fitting else 1
    return x.reshape(x.shape[0], x.shape[1], parts, length // parts)
