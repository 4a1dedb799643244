"""The spread of sampling units about estimates that are known only at the end.

A unit is a batch, or a sample: one entry of the batch's first axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnstats.moments import Moments, Number

_PRODUCTS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
"""The entries of a symmetric matrix that are kept, in their order."""

STATE_ROWS = 2 + len(_PRODUCTS)
"""Rows of a spread's state."""


_FAR = 100.0
"""Standard deviations from which on a reference is far off: squares keep 8 digits of variances."""


def _symmetric(kept: Tensor) -> Tensor:
    """Return the matrix, (3, 3, C), of these entries, (6, C)."""
    positions = [_PRODUCTS.index((min(i, j), max(i, j))) for i in range(3) for j in range(3)]
    # (Not by the list: a device would wait for a copy of it.)
    return torch.stack([kept[i] for i in positions]).view(3, 3, *kept.shape[1:])


def transformed(matrix: Tensor, shift: Tensor, of_u: Tensor, constant: Tensor) -> Tensor:
    """Return the second moments of ``(1, u + shift, q + of_u u + constant)``.

    Args:
        matrix: those of ``(1, u, q)``, of shape (3, 3, C).
        shift: of shape (C,).
        of_u: of shape (C,).
        constant: of shape (C,).
    """
    for _ in range(2):  # of the rows, then of the columns
        one, u, q = matrix
        matrix = torch.stack([one, u + shift * one, q + of_u * u + constant * one]).transpose(0, 1)
    return matrix


def state_of_units(mean: Tensor, m2: Tensor, count: Number, reference: Tensor) -> Tensor:
    """Return the ``state()`` of a :class:`Spread` that was given these units, (rows, C).

    q is a mean square about the reference, as u is, and a unit weighs by its squared count.

    Args:
        mean: each unit's mean, of shape (N, C).
        m2: each unit's sum of squared deviations, of shape (N, C).
        count: number of every unit's values per channel, or of each, of shape (N, 1).
        reference: what u and q are about, of shape (C,).
    """
    u = mean - reference
    if isinstance(count, Tensor):
        q = (m2 / count.clamp(min=1)).addcmul_(u, u)
        weights = count.square()
        of_one, num_units = weights.sum().expand_as(reference), (count > 0).sum()
        sums = [of_one, *((weights * x).sum(0) for x in (u, q, u * u, u * q, q * q))]
        return torch.stack([num_units.expand_as(reference), reference, *sums])
    q = (m2 / max(count, 1)).addcmul_(u, u)
    num_units = torch.full_like(reference, len(mean) if count else 0)
    head = torch.stack([num_units, reference, num_units * count**2])
    return torch.cat([head, torch.stack([u, q, u * u, u * q, q * q]).sum(1).mul_(count**2)])


def center_near(mean: Tensor, var: Tensor, reference: Tensor) -> Tensor:
    """Return what to take mean squares about: the reference, or the mean where that is far off.

    Of squares that are much larger than the variance, their own spread would lose all digits. One
    reference for all batches, where it serves, saves bringing them to one.
    """
    return torch.where((mean - reference).square() > _FAR**2 * var, mean, reference)


def merged_states(states: Sequence[Tensor]) -> Tensor:
    """Return the state of the units of all, about the reference of the first."""
    merged = Spread(states[0][0], about_reference=True)
    for state in states:
        merged.merge_state(state)
    return merged.state()


class Spread:
    """The spread between units, about estimates that are known only at the end.

    It keeps the weighted second moments of each unit's features ``(1, u, q)``: u is the
    unit's mean about the first unit's mean, q a mean square. The deviation of a unit from
    the final estimate is a linear form in the features, so its sum of squares is a quadratic
    form in their second moments, and no second pass is needed.

    Args:
        like: any float tensor of shape (C,), for its shape, dtype and device.
        about_reference: q is a mean square about the same reference as u.
    """

    def __init__(self, like: Tensor, *, about_reference: bool) -> None:
        self._about_reference = about_reference
        self._referred = False  # whether every channel has its reference
        self.num_units = torch.zeros_like(like)
        self.reference = torch.zeros_like(like)
        self._sums = like.new_zeros(len(_PRODUCTS), *like.shape)

    @property
    def matrix(self) -> Tensor:
        """The symmetric matrix of second moments, of shape (3, 3, C)."""
        return _symmetric(self._sums)

    def average(self) -> Tensor:
        """Return the weighted averages of u and q, (2, C)."""
        return self._sums[1:3] / self._sums[0]

    def offset(self, batch: Moments) -> Tensor:
        """Return u, the batch's mean about the first one that the channel saw."""
        if not self._referred:
            first = (self.num_units == 0) & (batch.count > 0)
            self.reference = torch.where(first, batch.mean, self.reference)
            self._referred = bool(((self.num_units > 0) | first).all())
        return batch.mean - self.reference

    def add(self, offset: Tensor, q: Tensor, weight: Tensor) -> None:
        """Add one batch's features; a weight of 0 leaves the channel out."""
        self.num_units = self.num_units + (weight > 0)
        weighted_offset, weighted_q = weight * offset, weight * q
        of_one, of_u, of_q, of_uu, of_uq, of_qq = self._sums
        of_one += weight
        of_u += weighted_offset
        of_q += weighted_q
        of_uu.addcmul_(weighted_offset, offset)
        of_uq.addcmul_(weighted_offset, q)
        of_qq.addcmul_(weighted_q, q)

    def state(self) -> Tensor:
        """Return the numbers of units, the references and the second moments, (rows, C)."""
        return torch.cat([self.num_units[None], self.reference[None], self._sums])

    def merge_state(self, state: Tensor) -> None:
        """Merge in another spread's state, brought to the reference of this one.

        About a reference that is lower by d, the features are ``(1, u + d, q + 2 d u + d^2)``:
        linear in what they were, so the matrix changes by that map on both sides.
        """
        num_units, reference, sums = state[0], state[1], state[2:]
        on_cpu = state.is_cpu  # where these shortcuts can be asked for at no cost
        if on_cpu and not self.num_units.any():
            self.num_units, self.reference, self._sums = num_units, reference, sums.clone()
            return
        if not (on_cpu and torch.equal(reference, self.reference)):
            self.reference = torch.where(self.num_units == 0, reference, self.reference)
            shift = torch.where(num_units == 0, 0, reference - self.reference)
            matrix = self._refer(_symmetric(sums), shift, torch.zeros_like(shift))
            sums = torch.stack([matrix[i, j] for i, j in _PRODUCTS])
        self._sums += sums
        self.num_units = self.num_units + num_units

    def about(self, mean: Tensor, q: Tensor) -> Tensor:
        """Return the second moments of ``(1, a, b)``, of shape (3, 3, C).

        a is a unit's mean minus ``mean``, b its own q minus ``q``; both q are about ``mean``
        where they are mean squares.
        """
        return self._refer(self.matrix, self.reference - mean, -q)

    def _refer(self, matrix: Tensor, shift: Tensor, constant: Tensor) -> Tensor:
        """Return a matrix brought to a reference that is lower by the shift; add to q."""
        if not self._about_reference:
            return transformed(matrix, shift, torch.zeros_like(shift), constant)
        return transformed(matrix, shift, 2 * shift, shift.square() + constant)

    def bessel(self) -> Tensor:
        """Return B / (B - 1) for B units; NaN for fewer than two."""
        return torch.where(self.num_units > 1, self.num_units / (self.num_units - 1), torch.nan)
