r"""The core: one recursion for every running statistic, and exact moments that merge by it.

State ``(mean, spread)``, a batch ``(batch_mean, batch_spread)``, ``d = batch_mean - mean``::

    mean   <- mean + d / size
    spread <- spread + (batch_spread - fade spread + between d d') / divisor

where ``d' = batch_mean - mean`` with the new mean, so that ``d d' = (1 - 1 / size) d^2``.
``spread`` is a variance or a sum of squared deviations; the :class:`Weights` make the recursion
an exponential average, a cumulative one, or Chan's exact merge. The policies that choose them
are in :mod:`bnstats.accumulators`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, TypeAlias, cast, overload

import numpy as np
import torch
from torch import Tensor

from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.formatting import describe
from bnstats.reduction import mean_and_m2, wide_dtype

Number: TypeAlias = float | Tensor
"""A number that the host knows, or a tensor that it need not wait for."""


class Weights(NamedTuple):
    """How one step of the recursion weighs a batch against the state.

    Each is a number, or a tensor that broadcasts over the channels.

    Attributes:
        size: 1 over the batch's weight in the mean; 1 replaces the state, spread and all.
        divisor: 1 over the weight of the batch's spread.
        fade: part of ``1 / divisor`` by which the state's spread fades.
        between: factor of the squared distance between the means; 0 leaves it out.
    """

    size: Number
    divisor: Number
    fade: Number = 1
    between: Number = 0


def fold(
    mean: Tensor, spread: Tensor, batch_mean: Tensor, batch_spread: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Return the state after one step of the recursion that this module's docstring states."""
    size, divisor, fade, between = weights
    delta = batch_mean - mean
    new_mean = _add_quotient(mean, delta, size)
    if isinstance(fade, Tensor):
        change = torch.addcmul(batch_spread, spread, fade, value=-1)
    elif torch.compiler.is_compiling():  # of an alpha, torch asks whether it is 1
        change = batch_spread - spread * fade
    else:
        change = torch.sub(batch_spread, spread, alpha=fade)
    if isinstance(between, Tensor):
        change = torch.addcmul(change, between * delta, batch_mean - new_mean)
    elif between != 0:  # a rule without the term between batches does not pay for it
        change = torch.addcmul(change, delta, batch_mean - new_mean, value=between)
    new_spread = _add_quotient(spread, change, divisor)
    if isinstance(size, Tensor):
        # A batch that replaces the state: 0 times what was there could be NaN, or leave digits.
        replaces = size == 1
        new_mean = torch.where(replaces, batch_mean, new_mean)
        new_spread = torch.where(replaces, batch_spread, new_spread)
    elif size == 1:
        return batch_mean.clone(), batch_spread.clone()
    return new_mean, new_spread


def fold_(
    mean: Tensor, spread: Tensor, batch_mean: Tensor, batch_spread: Tensor, weights: Weights
) -> bool:
    """Take the step of :func:`fold` in place, by numbers: the same in fewer operations.

    Returns:
        Whether it was taken. A batch that is not finite, or would make the state so, leaves the
        state as it is.
    """
    size, divisor, fade, between = cast("tuple[float, float, float, float]", weights)
    delta = batch_mean - mean
    target = batch_spread
    if between != 0 and size != 1:
        target = torch.addcmul(target, delta, delta, value=between * (1 - 1 / size))
    # Where a mean is not finite, neither is the variance about it.
    if not math.isfinite(target.max()):
        return False
    if size == 1:
        mean.copy_(batch_mean)
        spread.copy_(batch_spread)
        return True
    mean.add_(delta, alpha=1 / size)
    if fade == 1:
        spread.lerp_(target, 1 / divisor)
    else:
        spread.add_(torch.sub(target, spread, alpha=fade), alpha=1 / divisor)
    return True


def _add_quotient(x: Tensor, y: Tensor, divisor: Number) -> Tensor:
    """Return ``x + y / divisor`` in one operation."""
    if isinstance(divisor, Tensor):
        return torch.addcdiv(x, y, divisor)
    return torch.add(x, y, alpha=1 / divisor)


@overload
def merge_all(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def merge_all(count: int, mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]: ...
def merge_all(count: int | Tensor, mean: Tensor, m2: Tensor) -> tuple[int | Tensor, Tensor, Tensor]:
    """Merge the moments of several, of shape (k,), (k, C) and (k, C), as :class:`Moments` does.

    Chan's update for all at once: what is within each, and between their means. The count may be
    one number, that of every one.
    """
    total: int | Tensor
    size: Number
    if isinstance(count, Tensor):
        total, size = count.sum(), count.to(mean.dtype).unsqueeze(1)
        merged = (size / total.clamp(min=1) * mean).sum(0)  # of no values the mean is 0
    else:
        total, size = count * len(mean), count
        merged = mean.sum(0) / max(len(mean), 1)
    between = (mean - merged).square() * size
    return total, merged, (m2 + between).sum(0)


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Number, mean and sum of squared deviations of the values of each channel.

    A frozen value. ``merge`` is Chan's exact update [1]_: an empty state is its identity, and
    any split of the values gives the same result to rounding.

    Attributes:
        count: number of values per channel, int64, of shape () or (C,).
        mean: mean of the values, of shape (C,); 0 where there are none.
        m2: sum of ``(value - mean)^2``, of shape (C,).

    Example:
        >>> import torch
        >>> from bnstats import Moments
        >>> x = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)
        >>> whole = Moments.from_batch(x[:2]) + Moments.from_batch(x[2:])
        >>> int(whole.count), whole.mean.tolist(), whole.var().tolist()
        (6, [5.0, 6.0], [14.0, 14.0])

    References:
        .. [1] Chan, Golub, LeVeque (1983), "Algorithms for Computing the Sample Variance",
           The American Statistician 37(3), equation 1.5.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.count, Tensor):
            object.__setattr__(self, "count", torch.tensor(self.count, device="cpu"))
        if self.mean.dim() != 1 or self.m2.shape != self.mean.shape:
            raise InvalidValueError(
                "Moments: expected mean and m2 of one shape (C,), got "
                f"{tuple(self.mean.shape)} and {tuple(self.m2.shape)}"
            )

    def __repr__(self) -> str:
        count = int(self.count) if self.count.dim() == 0 and not self.count.is_meta else self.count
        return describe("Moments", {"count": count, "mean": self.mean, "m2": self.m2})

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return self.mean.shape[0]

    @classmethod
    def empty(cls, num_features: int, *, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values: the identity of ``merge``."""
        if isinstance(num_features, bool) or not isinstance(num_features, Integral):
            got = type(num_features).__name__
            raise InvalidTypeError(f"num_features: expected an int, got {got}")
        if num_features < 0:
            raise InvalidValueError(f"num_features: expected 0 or more, got {num_features}")
        # (torch.get_default_device raises in torch 2.6 once it was set to None.)
        device = torch.empty(0).device if device is None else torch.device(device)
        zeros = torch.zeros(num_features, dtype=wide_dtype(device), device=device)
        return cls(torch.tensor(0, device="cpu"), zeros, zeros)

    @classmethod
    def from_batch(cls, x: Tensor, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
        """Return the moments of a batch, per channel, in float64 where the device has it.

        Args:
            x: values of any dtype, for example of shape (N, C, H, W).
            channel_dim: the axis of x that holds the channels.
            mask: boolean, broadcastable to x without its channel axis, for example of shape
                (N, H, W); positions where it is False do not count.

        Returns:
            Moments of ``x.numel() / C`` values per channel, or of as many as the mask keeps.

        Raises:
            InvalidValueError: no such axis, or a mask whose shape does not fit.
            InvalidTypeError: x is not a tensor, or the mask is not boolean.
        """
        if not isinstance(x, Tensor):
            hint = "; torch.from_numpy(x) is one" if isinstance(x, np.ndarray) else ""
            raise InvalidTypeError(f"x: expected a tensor, got {type(x).__name__}{hint}")
        if not -x.dim() <= channel_dim < x.dim():
            raise InvalidValueError(
                f"channel_dim: x of shape {tuple(x.shape)} has no axis {channel_dim}"
            )
        if mask is not None:
            x = _select(x.movedim(channel_dim, -1), mask)
        elif channel_dim % x.dim() != 1:
            x = x.unsqueeze(0).movedim(channel_dim % x.dim() + 1, 1)
        x = x.detach()
        if x.device.type != "cpu":  # where the reduction is in x's own precision
            x = x.to(wide_dtype(x.device))
        mean, m2 = mean_and_m2(x)
        count = x.numel() // x.shape[1] if x.shape[1] else 0
        return cls(torch.tensor(count, device="cpu"), mean, m2)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the values of both.

        Raises:
            InvalidValueError: the other has another number of channels.
        """
        if self.num_features != other.num_features:
            raise InvalidValueError(
                f"merge: expected {self.num_features} channels, got {other.num_features}; where "
                "channels are in the last axis, Moments.from_batch takes channel_dim=-1"
            )
        total = self.count + other.count
        # The count of a batch is on CPU, and operators on three tensors take those of one device.
        whole, added = (x.to(self.mean, non_blocking=True) for x in (total, other.count))
        # Of no values, the size is infinite: they move nothing.
        weights = Weights(size=whole.clamp(min=1) / added, divisor=1, fade=0, between=added)
        return Moments(total, *fold(self.mean, self.m2, other.mean, other.m2, weights))

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def var(self, correction: int | Tensor = 1) -> Tensor:
        """Return ``m2 / (count - correction)``; NaN where that is not defined.

        Args:
            correction: 1 for the unbiased variance, 0 for the biased one; a tensor of shape
                (C,) chooses per channel.
        """
        divisor = (self.count - correction).to(self.m2, non_blocking=True)
        return torch.where(divisor > 0, self.m2 / divisor, torch.nan)


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of x, of shape (..., C), that the mask keeps, as (values, C)."""
    if mask.dtype != torch.bool:
        raise InvalidTypeError(f"mask: expected torch.bool, got {mask.dtype}")
    try:
        mask = mask.broadcast_to(x.shape[:-1])
    except RuntimeError:
        raise InvalidValueError(
            f"mask: expected a shape that broadcasts to {tuple(x.shape[:-1])} (x without its "
            f"channel axis), got {tuple(mask.shape)}"
        ) from None
    return x[mask]
