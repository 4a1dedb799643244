r"""The core: one recursion for every running statistic, and exact moments that merge by it.

State ``(mean, spread)``, what comes ``(other_mean, other_spread)``, ``d = other_mean - mean``::

    mean   <- mean + step d
    spread <- keep spread + gain other_spread + between d^2

``spread`` is a variance or a sum of squared deviations; the four :class:`Weights` make the
recursion an exponential average, a cumulative one, or Chan's exact merge. The policies that
choose them are in :mod:`bnstats.accumulators`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.reduction import mean_and_m2, wide_dtype

Number: TypeAlias = float | Tensor
"""A number that the host knows, or a tensor that it need not wait for."""


class Weights(NamedTuple):
    """How one step of the recursion weighs what it has and what comes.

    Each is a number or a tensor that broadcasts over the channels.
    """

    step: Number
    keep: Number
    gain: Number
    between: Number


def fold_(
    mean: Tensor, spread: Tensor, other_mean: Tensor, other_spread: Tensor, weights: Weights
) -> None:
    """Take one step of the recursion that this module's docstring states, in place."""
    step, keep, gain, between = weights
    delta = other_mean - mean
    _add_scaled_(mean, delta, step)
    if isinstance(keep, Tensor):
        spread.mul_(keep)
        _add_scaled_(spread, other_spread, gain)
    elif keep == 1 - gain:  # an average, by whose policy they are equal to the bit
        spread.lerp_(other_spread, gain)
    else:
        if keep != 1:
            spread.mul_(keep)
        _add_scaled_(spread, other_spread, gain)
    if isinstance(between, Tensor):
        spread.addcmul_(between * delta, delta)
    elif between != 0:  # a rule without the term between batches does not pay for it
        spread.addcmul_(delta, delta, value=between)


def fold(
    mean: Tensor, spread: Tensor, other_mean: Tensor, other_spread: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Return what :func:`fold_` makes of a state, and leave the state alone."""
    mean, spread = mean.clone(), spread.clone()
    fold_(mean, spread, other_mean, other_spread, weights)
    return mean, spread


def _add_scaled_(x: Tensor, y: Tensor, scale: Number) -> None:
    """Add scale y to x, in one operation where the host knows the scale."""
    if not isinstance(scale, Tensor):
        x.add_(y, alpha=scale)
    elif scale.dim():
        x.addcmul_(y, scale)
    else:  # which may be on the host, where addcmul_ need not take it from
        x.add_(scale * y)


@dataclass(frozen=True, eq=False)
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
        object.__setattr__(self, "count", torch.as_tensor(self.count))
        if self.mean.dim() != 1 or self.m2.shape != self.mean.shape:
            raise InvalidValueError(
                "Moments: expected mean and m2 of one shape (C,), got "
                f"{tuple(self.mean.shape)} and {tuple(self.m2.shape)}"
            )

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return self.mean.shape[0]

    @classmethod
    def empty(cls, num_features: int, *, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values: the identity of ``merge``."""
        if num_features < 0:
            raise InvalidValueError(f"num_features: expected 0 or more, got {num_features}")
        zeros = torch.zeros(
            num_features, dtype=wide_dtype(torch.device(device or "cpu")), device=device
        )
        return cls(torch.tensor(0), zeros, zeros)

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
            raise InvalidTypeError(f"x: expected a tensor, got {type(x).__name__}")
        if not -x.dim() <= channel_dim < x.dim():
            raise InvalidValueError(
                f"channel_dim: x of shape {tuple(x.shape)} has no axis {channel_dim}"
            )
        if mask is not None:
            x = _select(x.movedim(channel_dim, -1), mask)
        elif channel_dim % x.dim() != 1:
            x = x.unsqueeze(0).movedim(channel_dim % x.dim() + 1, 1)
        mean, m2 = mean_and_m2(x.detach())
        count = x.numel() // x.shape[1] if x.shape[1] else 0
        return cls(torch.tensor(count), mean, m2)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the values of both."""
        if self.num_features != other.num_features:
            raise InvalidValueError(
                f"merge: expected {self.num_features} channels, got {other.num_features}"
            )
        total = self.count + other.count
        step = other.count.to(self.mean.dtype) / total.clamp(min=1)
        weights = Weights(step=step, keep=1, gain=1, between=self.count * step)
        return Moments(total, *fold(self.mean, self.m2, other.mean, other.m2, weights))

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def var(self, correction: int | Tensor = 1) -> Tensor:
        """Return ``m2 / (count - correction)``; NaN where that is not defined.

        Args:
            correction: 1 for the unbiased variance, 0 for the biased one; a tensor of shape
                (C,) chooses per channel.
        """
        divisor = (self.count - correction).to(self.m2.dtype)
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
