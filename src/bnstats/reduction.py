"""Mean and sum of squared deviations of one batch, per channel: fast, and without cancellation.

On CPU torch's own variance kernels are far from the limit that memory sets. Row sums and row
norms read x at that limit; combined in float64 they give the variance, as long as it is not
small against the squared mean. Channels where it is small are computed again, centered, in
float64.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnstats.private import outside_modes

_LONGEST_ROW = 1024
"""Values that one float32 accumulator may add up: a longer row loses digits (see tests)."""

SHORTEST_ROW = 32
"""Values from which on a row's sum is fast."""

FEWEST_FAST = 2**16
"""Values from which on the fast sums, several operations, beat torch's one slow kernel."""

_LARGEST_SQUARED_MEAN = 8.0
"""Squared mean over variance above which the fast sums are not trusted: they have a relative
error of some 2e-7, which the subtraction magnifies by this ratio plus one."""

_MANY = 2**21
"""Values from which on it pays to guess whether the sums will cancel, and to read in parts."""

_CACHED = 2**17
"""Values that stay in a core's cache while they are written to."""

_CACHED_TO_READ = 2**19
"""Values that stay in the caches of all cores until they are read again."""


_has_float64 = {"cpu": True, "cuda": True, "meta": True}
"""What is known of devices. To ask is an operator and a wait, which is not done for these."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64."""
    known = device.type if device.type in _has_float64 else str(device)
    if known not in _has_float64 and not torch.compiler.is_compiling():
        _has_float64[known] = _adds_in_float64(device)
    return torch.float64 if _has_float64.get(known, True) else torch.float32


def _adds_in_float64(device: torch.device) -> bool:
    """Ask a device; some hold such numbers, and do not compute with them."""
    with outside_modes():
        try:
            return bool(torch.ones(2, dtype=torch.float64, device=device).sum() == 2)
        except torch.OutOfMemoryError:  # no answer
            raise
        except (RuntimeError, TypeError):
            return False


Expected: TypeAlias = tuple[Tensor, Tensor]
"""The mean and the variance that a batch is likely to have, each of shape (C,)."""


def mean_and_m2(x: Tensor, expected: Expected | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations per channel, for x of shape (N, C, ...).

    What is expected only decides which way is tried first, where sums about 0 may cancel.

    On CPU, fewer than 2^16 values are added up in float64; sums of more have a relative error of
    some 2e-7, as the module says. Elsewhere one pass adds x up in x's own precision, or float32
    if that is higher: the mean is off by some roundings to it, which is what a float32
    running_mean is off by anyway. Exactly, it would take three passes over the memory in place
    of one; ``x.double()`` asks for that.
    """
    wide = wide_dtype(x.device)
    if x.numel() == 0:
        zeros = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
        return zeros[0], zeros[1]
    if x.device.type != "cpu":
        x = x.to(wide if x.dtype == torch.float64 or not x.is_floating_point() else torch.float32)
        # Welford's algorithm in one launch.
        var, mean = torch.var_mean(x, other_axes(x), correction=0)
        return mean.to(wide), var.to(wide).mul_(x.numel() // x.shape[1])
    if x.numel() < FEWEST_FAST or not x.is_floating_point():
        return _exactly(x)
    fast = from_rows(x, expected)
    return _exactly(x) if fast is None else fast


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of the squares per channel, for x of shape (N, C, ...) with values.

    In the wide dtype on CPU, though rows are added up in float32 or x's own precision if that
    is higher; elsewhere all of it is.
    """
    count = x.numel() // x.shape[1]
    if x.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(x, dim=other_axes(x), dtype=accumulator(x))
        return norm.square().div_(count)
    rows = short_rows(x)
    squares = x.double().square().sum(other_axes(x)) if rows is None else sums_of_squares(rows)
    return squares.div_(count)


def mean_square_on_host(x: Tensor) -> NDArray[np.float64]:
    """Return the same as an array, for x on CPU: numpy's small operations cost less."""
    rows = short_rows(x)
    if rows is None or rows.stride(-1) != 1:
        return mean_square(x).numpy()
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=accumulator(x)).numpy()
    axes = 0 if norms.ndim == 2 else (0, 2)
    squares: NDArray[np.float64] = np.square(norms).sum(axes, dtype=np.float64)
    return squares / (x.numel() // x.shape[1])


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector of shape (C,) in the shape in which it broadcasts with x."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def other_axes(x: Tensor) -> list[int]:
    """Return all axes but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _exactly(x: Tensor) -> tuple[Tensor, Tensor]:
    """Take two passes in float64, the squares about the mean; of equal values m2 is 0."""
    if x.dtype == torch.float64:
        # A mean of so many bits is rounded, unless its values are near 0.
        first = x[(slice(1), slice(None), *[slice(1)] * (x.dim() - 2))]
        mean, m2 = _two_passes(x - first)
        return mean.add_(first.flatten()), m2
    return _two_passes(x.double())


def _two_passes(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var.mul_(x.numel() // x.shape[1])


def from_rows(x: Tensor, expected: Expected | None = None) -> tuple[Tensor, Tensor] | None:
    """Add up rows and their squares in x's precision, the rows' results in float64.

    Returns:
        What :func:`mean_and_m2` does, or None where another way is faster: x, floating-point on
        CPU, has no fitting rows, or the sums cancel in too many channels.
    """
    rows = short_rows(x)
    if rows is None:
        return None
    shift = None
    if expected is not None and x.numel() >= _MANY and x.is_contiguous():
        shift = _shift(*expected)
    mean, m2, cancelling = _from_sums(x, rows, shift)
    if cancelling is not None and _are_many(cancelling) and x.is_contiguous():
        mean, m2, cancelling = _from_sums(x, rows, mean)
    if cancelling is not None:
        if _are_many(cancelling):
            return None
        channels = cancelling.nonzero().squeeze(1)
        exact_mean, exact_m2 = _exactly(x.index_select(1, channels))
        mean.index_copy_(0, channels, exact_mean)
        m2.index_copy_(0, channels, exact_m2)
    return mean, m2


def _shift(mean: Tensor, var: Tensor) -> Tensor | None:
    """Return the expected mean if the sums about 0 of many channels would cancel."""
    cancelling = mean.square() > _LARGEST_SQUARED_MEAN * var
    return mean if _are_many(cancelling) else None


def _from_sums(
    x: Tensor, rows: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return mean, m2, and which channels' sums about the shift cancel; None if none do."""
    if shift is not None:
        shift = shift.to(x.dtype)
    total, squares = _sums(rows) if shift is None else _sums_about(x, shift)
    mean = total / (x.numel() // x.shape[1])
    m2 = torch.addcmul(squares, total, mean, value=-1)
    if shift is not None:
        mean = mean + shift
    return mean, m2, cancelling_channels(squares, m2)


def _are_many(channels: Tensor) -> bool:
    """Whether these are too many to be computed again by themselves."""
    return channels.sum().item() > len(channels) // 4


def cancelling_channels(squares: Tensor, m2: Tensor) -> Tensor | None:
    """Return which channels lose too many digits by cancellation; None if none do."""
    excess = torch.sub(squares, m2, alpha=1 + _LARGEST_SQUARED_MEAN)
    # Not the other way round: what is not finite may be so here only.
    return None if excess.max().item() <= 0 else (excess <= 0).logical_not_()


def _sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and the sum of squares per channel."""
    if rows.shape[-1] < SHORTEST_ROW and rows.dim() == 3 and rows.is_contiguous():
        # Such rows are slow to add up: the samples first leaves few of them.
        samples = rows.to(accumulator(rows)).flatten(1)
        sums = torch.stack((samples.sum(0), samples.square().sum(0)))
        total, squares = sums.view(2, *rows.shape[1:]).sum(-1, dtype=torch.float64)
        return total, squares
    total, squares = sums_of_rows(rows)
    return per_channel(total), per_channel(squares)


def _sums_about(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of :func:`_sums` for ``x - shift``, a few samples at a time.

    What is read again then comes from the cache.
    """
    step = max(1, _CACHED * len(x) // x.numel())
    shift = along_channels(shift, x)
    difference = torch.empty_like(x[:step])
    totals = []
    for samples in x.split(step):
        part = torch.sub(samples, shift, out=difference[: len(samples)])
        rows = short_rows(part)
        assert rows is not None  # for x has them, with the same axes
        totals.append(torch.stack(_sums(rows)))
    total, squares = torch.stack(totals).sum(0)
    return total, squares


def accumulator(x: Tensor) -> torch.dtype:
    """Return in what to add up x's values: float32, or float64 if x is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sums_of_squares(rows: Tensor) -> Tensor:
    """Add up the squares of rows, (N, C, ..., length), per channel; return float64."""
    return per_channel(squares_of_rows(rows))


def sums_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Add up each row, and its squares; of many, in parts that the squares read from the cache."""
    if rows.numel() < _MANY or not rows.is_contiguous():
        return rows.sum(-1, dtype=accumulator(rows)), squares_of_rows(rows)
    parts = rows.flatten(0, -2).split(max(1, _CACHED_TO_READ // rows.shape[-1]))
    sums = ((part.sum(-1, dtype=accumulator(rows)), squares_of_rows(part)) for part in parts)
    total, squares = (torch.cat(x).view(rows.shape[:-1]) for x in zip(*sums, strict=True))
    return total, squares


def squares_of_rows(rows: Tensor) -> Tensor:
    """Add up the squares of each row."""
    if rows.stride(-1) == 1:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=accumulator(rows))
        return norms.square()
    # channels_last: a norm over a strided axis is slow
    return rows.to(accumulator(rows)).square().sum(-1)


def per_channel(of_rows: Tensor) -> Tensor:
    """Add up what rows gave, of shape (N, C) or (N, C, rows), in float64."""
    axes = 0 if of_rows.dim() == 2 else (0, 2)
    return of_rows.sum(axes, dtype=torch.float64)


def short_rows(x: Tensor) -> Tensor | None:
    """View x of shape (N, C, ...) as rows of at most the longest length.

    Returns:
        Of shape (N, C, length), or (N, C, rows, length) where there are several; None where x
        has no such rows.
    """
    if x.dim() == 2:
        return None
    length = math.prod(x.shape[2:])
    if length <= _LONGEST_ROW:
        return x.flatten(2)
    fewest = -(-length // _LONGEST_ROW)
    # (Not by next with a default: torch 2.6 cannot compile that.)
    fitting = [n for n in range(fewest, 4 * fewest) if length % n == 0]
    if fitting:
        rows: Tensor = x.flatten(2).unflatten(2, (fitting[0], -1))
        return rows
    if x.dim() > 3 and SHORTEST_ROW <= x.shape[-1] <= _LONGEST_ROW:
        return x.flatten(2, -2)
    return None
