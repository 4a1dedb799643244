"""The spread of batches about estimates that are known only at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from bnstats.moments import Moments

_PRODUCTS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
"""The entries of a symmetric matrix that are kept, in their order."""


def _symmetric(kept: Tensor) -> Tensor:
    """Return the matrix, (3, 3, C), of these entries, (6, C)."""
    positions = [_PRODUCTS.index((min(i, j), max(i, j))) for i in range(3) for j in range(3)]
    matrix: Tensor = kept[positions]
    return matrix.view(3, 3, *kept.shape[1:])


class Spread:
    """The spread between batches, about estimates that are known only at the end.

    It keeps the weighted second moments of each batch's features ``(1, u, q)``: u is the
    batch's mean about the first batch's mean, q a mean square. The deviation of a batch from
    the final estimate is a linear form in the features, so its sum of squares is a quadratic
    form in their second moments, and no second pass is needed.

    Args:
        like: any float tensor of shape (C,), for its shape, dtype and device.
        about_reference: q is a mean square about the same reference as u.
    """

    def __init__(self, like: Tensor, *, about_reference: bool) -> None:
        self._about_reference = about_reference
        self._referred = False  # whether every channel has its reference
        self.num_batches = torch.zeros_like(like)
        self.reference = torch.zeros_like(like)
        self._sums = like.new_zeros(len(_PRODUCTS), *like.shape)

    @property
    def matrix(self) -> Tensor:
        """The symmetric matrix of second moments, of shape (3, 3, C)."""
        return _symmetric(self._sums)

    def offset(self, batch: Moments) -> Tensor:
        """Return u, the batch's mean about the first one that the channel saw."""
        if not self._referred:
            first = (self.num_batches == 0) & (batch.count > 0)
            self.reference = torch.where(first, batch.mean, self.reference)
            self._referred = bool(((self.num_batches > 0) | first).all())
        return batch.mean - self.reference

    def add(self, offset: Tensor, q: Tensor, weight: Tensor) -> None:
        """Add one batch's features; a weight of 0 leaves the channel out."""
        self.num_batches = self.num_batches + (weight > 0)
        weighted_offset, weighted_q = weight * offset, weight * q
        of_one, of_u, of_q, of_uu, of_uq, of_qq = self._sums
        of_one += weight
        of_u += weighted_offset
        of_q += weighted_q
        of_uu.addcmul_(weighted_offset, offset)
        of_uq.addcmul_(weighted_offset, q)
        of_qq.addcmul_(weighted_q, q)

    def state(self) -> Tensor:
        """Return the numbers of batches, the references and the second moments, (8, C)."""
        return torch.cat([self.num_batches[None], self.reference[None], self._sums])

    def merge_state(self, state: Tensor) -> None:
        """Merge in another spread's state, brought to the reference of this one.

        About a reference that is lower by d, the features are ``(1, u + d, q + 2 d u + d^2)``:
        linear in what they were, so the matrix changes by that map on both sides.
        """
        num_batches, reference, matrix = state[0], state[1], _symmetric(state[2:])
        self.reference = torch.where(self.num_batches == 0, reference, self.reference)
        shift = torch.where(num_batches == 0, 0, reference - self.reference)
        zero, one = torch.zeros_like(shift), torch.ones_like(shift)
        of_q = [shift.square(), 2 * shift, one] if self._about_reference else [zero, zero, one]
        rows = [torch.stack(row) for row in ([one, zero, zero], [shift, one, zero], of_q)]
        change = torch.stack(rows)
        # Two small matrix products per channel, as sums: a batched one costs far more.
        matrix = (change[:, :, None] * matrix).sum(1)
        matrix = (matrix[:, None] * change).sum(2)
        self._sums += torch.stack([matrix[i, j] for i, j in _PRODUCTS])
        self.num_batches = self.num_batches + num_batches

    def sum_of_squares(self, constant: Tensor, of_offset: Tensor, of_q: Tensor) -> Tensor:
        """Return the weighted sum of ``(constant + of_offset u + of_q q)^2`` over the batches."""
        form = torch.stack([constant, of_offset, of_q])
        return (form[:, None] * self.matrix * form).sum((0, 1)).clamp(min=0)

    def bessel(self) -> Tensor:
        """Return B / (B - 1) for B batches; NaN for fewer than two."""
        return torch.where(
            self.num_batches > 1, self.num_batches / (self.num_batches - 1), torch.nan
        )
